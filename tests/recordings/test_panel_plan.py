"""The panel as a plan: what is recorded in which order, and how far it is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from command_line import dvar
from fake_record import write_fake_record

from dvar.config.presets import preset_settings
from dvar.errors import RefusedInput
from dvar.mini import TUNING, noun
from dvar.recordings import panel_plan, sweep
from dvar.recordings.config import Panel, RecordConfig, record_problems
from dvar.recordings.panel import SHIFTED, STAGES, PanelStage, name_variation, panel_concepts, rate_length
from dvar.recordings.panel_plan import describe_omissions, find_missing_model, format_stages, plan_panel, plan_stage
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.spec import RecordingSpec
from dvar.training.progress import format_duration


def plan(name: Panel) -> list[RecordingSpec]:
    return [spec for specs in plan_panel(RecordConfig(panel=name, records="r")).values() for spec in specs]


def test_the_first_32_runs_decide_the_comparisons() -> None:
    first = plan("all")[:32]
    rates = Counter(
        (spec.method, dict(spec.settings)["learning_rate"] / preset_settings("mini", spec.method)["learning_rate"])
        for spec in first
    )
    assert rates == {(method, rate): 8 for method in SHIFTED for rate in (0.25, 4.0)}
    assert len({spec.concept for spec in first}) == 8


@pytest.mark.parametrize("stage", STAGES[:3], ids=lambda stage: stage.title)
def test_an_interrupted_stage_has_whole_concepts_but_for_the_last(stage: PanelStage) -> None:
    whole, concepts = len(stage.variations) * len(stage.methods), [spec.concept for spec in plan_stage(stage, "r")]
    for count in range(len(concepts)):
        assert sum(number < whole for number in Counter(concepts[:count]).values()) <= 1


def test_every_run_is_planned_once_and_the_preset_s_is_shared() -> None:
    names = [spec.name_in_records for spec in plan("all")]
    assert len(set(names)) == len(names)
    shift, main = ({spec.name_in_records for spec in plan(name)} for name in ("shift", "main"))
    assert len(shift) == 5 * 2 * 8
    assert len(main) == 3 * 16
    assert len(shift & main) == 2 * 8, "the first 8 concepts at the preset's rate"
    assert {name.rsplit("/", 1)[1] for name in main} == {"0"}


def test_the_panel_s_concepts_are_fresh_and_of_many_classes() -> None:
    concepts = panel_concepts()
    assert len(concepts) == len(set(concepts)) == 48
    assert not set(concepts) & set(TUNING)
    earlier = {"black_cat", "blue_dog", "green_dotted_backpack", "red_striped_mug", "green_checked_boot"}
    assert earlier.isdisjoint(concepts[:16])
    assert len({noun(name) for name in concepts[:16]}) == 16


def test_a_slower_run_is_recorded_longer() -> None:
    assert [rate_length(rate) for rate in (0.25, 0.5, 1, 2, 4)] == [4, 2, 1, 2**-0.5, 0.5]
    caps = {spec.name_in_records.rsplit("/", 1)[1]: spec.config.max_train_steps for spec in plan("shift")[::2]}
    base = preset_settings("mini", "textual-inversion")["max_train_steps"]
    assert caps["0"] == base
    assert max(caps.values()) == 4 * base
    assert min(caps.values()) == base / 2
    custom = next(spec for spec in plan("main") if spec.method == "custom-diffusion")
    assert custom.config.max_train_steps == 2500


def test_each_stage_changes_one_thing_and_its_runs_say_so() -> None:
    for stage in STAGES:
        if find_missing_model(stage):
            continue
        titles = [variation.title for variation in stage.variations]
        for spec in plan_stage(stage, "r"):
            assert len(spec.setting) <= 1
            if spec.setting:
                assert name_variation(spec.setting) in titles
    assert name_variation({"learning_rate": {"value": 0.015, "preset": 0.005}}) == "rate × 3"
    assert name_variation({"seed": {"value": 7, "preset": 0}}) == "seed 7"


def test_scored_steps_are_log_spaced_and_sixteen() -> None:
    for spec in plan("shift")[:12]:
        steps = spec.scored_steps
        assert steps[0] == 0
        assert steps[-1] == spec.config.max_train_steps
        assert 14 <= len(steps) <= 16
        assert max(later / earlier for earlier, later in pairwise(steps[1:])) < 2.1


def test_a_base_model_that_is_not_installed_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_plan, "model_problems", lambda name: [f"no {name} here"] * (name == "mini-flow"))
    config = RecordConfig(panel="all", records="r")
    assert list(describe_omissions(config)) == ["second base model: left out, no mini-flow here"]
    assert not any(spec.model == "mini-flow" for spec in plan("all"))
    with pytest.raises(RefusedInput, match="--panel flow cannot be recorded: no mini-flow here"):
        plan("flow")
    monkeypatch.setattr(panel_plan, "model_problems", lambda name: [])
    assert len(plan("flow")) == 16
    assert {spec.folder.name for spec in plan("flow")} == {"0,model=mini-flow"}


def test_the_panel_fixes_what_is_recorded() -> None:
    assert record_problems(RecordConfig(panel="all", records="there", workers=2, estimate=True)) == []
    problems = record_problems(RecordConfig(panel="main", seeds=(1,), preset="cpu", first=2))
    assert problems == ["--panel fixes first, got 2: drop it", "--panel fixes seeds, got (1,): drop it"]
    assert record_problems(RecordConfig(panel="none"))[0].startswith("panel must be one of shift, main")  # type: ignore[arg-type]
    assert {stage.panel for stage in STAGES} | {"all"} == set(get_args(Panel))


def test_the_listing_says_what_is_there_and_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RecordConfig(panel="shift", records=str(tmp_path))
    (stage, specs), *_ = plan_panel(config).items()
    for spec in specs[:3]:
        write_fake_record(tmp_path, spec.method, spec.concept, setting=spec.setting, cap=20)
        assert (spec.folder / "done.json").exists()
    (specs[2].folder / "done.json").write_text("{}")
    (line,) = format_stages({stage: specs}, {})
    assert line.endswith("2 of 32 recorded")
    units = {method: {"start_up": 0.0, "train": 0.1, "forward": 0.0, "picture": 0.0} for method in SHIFTED}
    caps = sum(spec.config.max_train_steps for spec in specs[2:])
    (line,) = format_stages({stage: specs}, units)
    assert line.endswith(f"about {format_duration(0.1 * caps)} of one process left")
    (tmp_path / "seconds.json").write_text(json.dumps(units))
    monkeypatch.setattr(sweep, "measure_methods", lambda specs, *_: dict[str, object]() if not specs else None)
    monkeypatch.setattr(sweep, "validate_recordings", lambda *_: None)
    lines: list[str] = []
    plans = {stage: specs}
    sweep.record_missing(specs, lines.append, only_estimate=True, describe=lambda units: format_stages(plans, units))
    assert lines[-1] == line
    assert lines[0].startswith("32 runs, 30 of them to record; preset panel: 8 prompts x 4 seeds")


def test_recordings_of_one_concept_under_all_settings_lie_apart() -> None:
    specs = [replace(spec, concept="red_bird") for spec in plan("all")]
    folders = Counter((spec.folder, spec.config.max_train_steps) for spec in dict.fromkeys(specs))
    assert max(folders.values()) == 1
    assert len({folder for folder, _ in folders}) == len(folders)


def test_the_protocol_s_page_is_what_is_recorded() -> None:
    page = " ".join((Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8").split())
    assert ", ".join(panel_concepts()[:16]) in page
    caps = {spec.method: f"{spec.config.max_train_steps:,}" for spec in plan("main")}
    assert "{} steps of Textual Inversion, {} of DreamBooth-LoRA, {} of Custom Diffusion".format(*caps.values()) in page
    for stage in STAGES[:3]:
        row = f"| `{stage.panel}` | {stage.title} | {stage.concepts} | Textual Inversion, DreamBooth-LoRA |"
        assert f"{row} {stage.concepts * len(stage.methods) * len(stage.variations)} |" in page
    protocol = PROTOCOLS["panel"]
    assert f"{protocol.samples['stratified']} stratified held draws at every step up to 27" in page
    assert f"{protocol.image_count} images of training prompts" in page


def test_the_command_refuses_what_the_panel_fixes(tmp_path: Path) -> None:
    answer = dvar("record", "--panel", "main", "--first", 2, "--records", tmp_path / "records")
    assert answer.status == 2
    assert "--panel fixes first, got 2: drop it" in answer.err
    assert not (tmp_path / "records").exists()
