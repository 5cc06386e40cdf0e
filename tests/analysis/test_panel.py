"""The panel on records whose right step is known: errors, comparisons, what may be claimed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_record import compute_oracle_step, write_fake_record
from hypothesis import given
from hypothesis import strategies as st

from dvar.analysis.panel import (
    CONSTANT,
    CORRECTED,
    DVAR_PRESET,
    DVAR_TUNED,
    OCTAVE,
    PERFECT,
    REGISTERED,
    PanelRun,
    PanelRuns,
    PanelStops,
    find_stops,
    list_cheap_records,
    make_grid,
)
from dvar.analysis.panel_comparison import (
    RATE_ENDS,
    Comparison,
    average_errors,
    compare_registered,
    compare_rules,
    may_claim,
    sign_flip_p,
)
from dvar.analysis.stop_quality import MeanInterval
from dvar.analysis.strategies import Strategy, evaluate_strategy
from dvar.errors import RefusedInput
from dvar.mini import TUNING
from dvar.recordings.archive import RecordingArchive
from dvar.stopping.cadence import PerOctave, is_due
from dvar.stopping.octave import Octave
from dvar.stopping.rules import Dvar

TI = "textual-inversion"
HEADER = {"protocol": {"name": "panel", "version": 1}, "base": "a" * 64}
CONCEPTS = {f"concept_{letter}": 16.0 * 2 ** (index / 5 - 0.5) for index, letter in enumerate("abcdef")}
"""The time constants of the concepts at the preset: half an octave about 16 steps to either side."""


def write_panel_record(
    root: Path, concept: str, rate: float = 1.0, *, learned: float, cap: int | None = None, **more: Any
) -> Path:
    setting = {"learning_rate": {"value": 0.005 * rate, "preset": 0.005}} if rate != 1 else None
    cap = round(12 * learned) if cap is None else cap
    options: dict[str, Any] = {"header": HEADER, "images": 4, "jitter": 1e-5, "every": 2, **more}
    return write_fake_record(root, TI, concept, cap=cap, learned=learned, setting=setting, **options)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> RecordingArchive:
    """Six concepts whose time scales as 1 / rate."""
    root = tmp_path_factory.mktemp("panel")
    for concept, learned in CONCEPTS.items():
        for rate in (0.25, 1.0, 4.0):
            write_panel_record(root, concept, rate, learned=learned / rate)
    return RecordingArchive.open(root)


@pytest.fixture(scope="module")
def panel(archive: RecordingArchive) -> PanelRuns:
    return PanelRuns.of(archive)


@pytest.fixture(scope="module")
def ends(panel: PanelRuns) -> PanelStops:
    return compare_registered(panel)[0]


def without(archive: RecordingArchive, lacks: Callable[[Any], bool]) -> RecordingArchive:
    return replace(archive, runs=tuple(run for run in archive if not lacks(run)))


def test_runs_know_their_place_and_their_right_step(panel: PanelRuns) -> None:
    assert len(panel.runs) == 18
    assert not panel.unlearned
    assert {(run.variation, run.rate) for run in panel.runs} == {
        ("rate × 1/4", 0.25),
        ("preset", 1.0),
        ("rate × 4", 4.0),
    }
    for run in panel.runs:
        expected = compute_oracle_step(CONCEPTS[run.run.concept] / run.rate)
        assert run.oracle == pytest.approx(expected, rel=0.05)
        assert run.choice == run.oracle, "both halves of noiseless images agree"
        assert not run.is_short
    assert len(panel.select(RATE_ENDS)) == 12
    assert panel.select(RATE_ENDS, ["dreambooth-lora"]) == []


def test_a_constant_is_the_median_of_the_other_concepts_at_the_preset(panel: PanelRuns, ends: PanelStops) -> None:
    presets = {run.run.concept: run.oracle for run in panel.select(["preset"])}
    for run, stop in ends.stops[CONSTANT].items():
        others = [np.log2(oracle) for concept, oracle in presets.items() if concept != run.run.concept]
        assert stop.step == pytest.approx(2 ** np.median(others))
        assert ends.stops[CORRECTED][run].step == pytest.approx(stop.step / run.rate)


def test_a_concept_s_own_runs_do_not_choose_its_settings(archive: RecordingArchive, ends: PanelStops) -> None:
    own = "concept_a"
    elsewhere = PanelRuns.of(without(archive, lambda run: run.concept == own and not run.setting))
    stops = PanelStops.of(elsewhere, elsewhere.select(RATE_ENDS), elsewhere.list_concepts(RATE_ENDS)).stops
    for name in (CONSTANT, CORRECTED, DVAR_TUNED):
        before = {run.run.name: stop for run, stop in ends.stops[name].items() if run.run.concept == own}
        after = {run.run.name: stop for run, stop in stops[name].items() if run.run.concept == own}
        assert before == after
        assert len(before) == 2


def test_errors_have_their_known_values(ends: PanelStops) -> None:
    # Time scales as 1 / rate: a constant is two octaves off, but for the spread of the concepts, and a corrected one
    # by that spread alone.
    spread = average_errors(ends, CORRECTED, ends.runs).mean
    assert 0.2 < spread < 0.5
    assert average_errors(ends, CONSTANT, ends.runs).mean == pytest.approx(2, abs=0.05)
    assert average_errors(ends, PERFECT, ends.runs).mean == 0
    error = average_errors(ends, CONSTANT, ends.runs)
    assert error.low < error.mean < error.high
    few = average_errors(ends, CONSTANT, ends.runs[:4])
    assert few.concepts < 6
    assert np.isnan(few.low)


def test_comparisons_are_paired_by_concept(ends: PanelStops) -> None:
    comparison = compare_rules(ends, CORRECTED, CONSTANT)
    assert comparison.outcome == "won"
    assert (comparison.difference.concepts, comparison.runs) == (6, 12)
    assert comparison.p == pytest.approx(2 / 2**6), "all six agree"
    back = compare_rules(ends, CONSTANT, CORRECTED)
    assert back.outcome == "lost"
    assert back.difference.mean == pytest.approx(-comparison.difference.mean)


def test_a_rule_against_itself_is_a_tie(ends: PanelStops) -> None:
    comparison = compare_rules(ends, OCTAVE, OCTAVE)
    assert comparison.difference.mean == 0
    assert comparison.p == 1
    assert comparison.outcome == "tie"


def test_every_registered_rule_stops_every_run(ends: PanelStops) -> None:
    for name in (*REGISTERED, PERFECT):
        assert set(ends.stops[name]) == set(ends.runs), name
    for run in ends.runs:
        stop = ends.stops[OCTAVE][run]
        assert stop.censored == (stop.step == run.run.cap)


def test_claims_end_at_the_first_comparison_that_is_not_won() -> None:
    def outcome(mean: float) -> Comparison:
        return Comparison("a", "b", MeanInterval(mean, mean - 0.1, mean + 0.1, 8), 0.01, 32)

    won, tie, lost = outcome(-1), outcome(0), outcome(1)
    assert [each.outcome for each in (won, tie, lost)] == ["won", "tie", "lost"]
    assert may_claim([won, won, won]) == [True, True, True]
    assert may_claim([won, tie, won]) == [True, True, False]
    assert may_claim([lost, won, won]) == [True, False, False]
    assert replace(won, p=0.06).outcome == "tie", "the interval alone does not win"
    assert replace(won, p=0.06).side == "won"
    assert replace(lost, p=0.06).outcome == "lost", "but it loses"
    assert replace(won, difference=MeanInterval(-1, -1.1, -0.9, 5)).outcome == "too few concepts"


@pytest.mark.parametrize(
    ("values", "p"), [([1.0] * 6, 2 / 64), ([1.0, -1.0], 1.0), ([3.0, 1.0], 0.5), ([0.0, 0.0, 0.0], 1.0)]
)
def test_the_p_of_known_differences(values: list[float], p: float) -> None:
    assert sign_flip_p(values) == p


def test_the_p_of_many_differences_is_drawn() -> None:
    # 20 equal differences: only the two sign patterns that agree are as far from 0, of 2^20.
    assert sign_flip_p([1.0] * 20) <= 3 / 2**16
    assert np.isnan(sign_flip_p([]))


@given(st.lists(st.floats(-5, 5).map(lambda value: round(value, 3)), min_size=1, max_size=8), st.sampled_from([-1, 8]))
def test_the_p_does_not_change_with_sign_or_unit(values: list[float], factor: float) -> None:
    assert sign_flip_p([factor * value for value in values]) == pytest.approx(sign_flip_p(values))
    assert 0 < sign_flip_p(values) <= 1


def test_stops_are_those_of_the_whole_run(archive: RecordingArchive) -> None:
    run = archive.runs[0]
    for rule in (Dvar(40, 0.3, strict_paper=True), Dvar(16, 0.05, strict_paper=True), Dvar(64, 1e-9)):
        result = evaluate_strategy(Strategy("rule", rule), run)
        (stop,) = find_stops((rule,), run, "eval")
        assert (stop.step, stop.censored) == (result.stop, result.censored)


def test_octave_reads_the_draws_one_by_one(archive: RecordingArchive) -> None:
    run = next(run for run in archive if run.variant.endswith("=0.00125"))
    (stop,) = find_stops((Octave(),), run, "stratified")
    assert not stop.censored
    steps, losses = run.series("stratified")
    from dvar.stopping.trace import Trace

    trace = Trace()
    for step, values in zip(steps.tolist(), losses, strict=True):
        trace.record(step, values)
        if Octave()(trace).stop:
            break
    assert trace.last_step == stop.step


def test_the_cheap_rule_reads_one_record_in_each_sixth_of_an_octave() -> None:
    steps = np.array([step for step in range(2000) if is_due(PerOctave(16), step)])
    cheap = steps[list_cheap_records(steps)]
    assert cheap[0] == 0
    assert cheap[1] >= 32
    for start in (64, 128, 256, 512):
        assert ((cheap >= start) & (cheap < 2 * start)).sum() == 6, start
    assert list_cheap_records(np.array([0, 10, 20])).tolist() == [0]


def test_grids_are_of_a_hundred_settings_in_steps() -> None:
    grid = make_grid("DVAR", TI)
    assert len(grid) == 100
    assert {rule.window for rule in grid if isinstance(rule, Dvar)} >= {30, 750}


def test_a_run_that_learned_nothing_is_left_out_and_named(archive: RecordingArchive, tmp_path: Path) -> None:
    write_panel_record(tmp_path, "concept_z", learned=1e9, cap=60, noise=0.01)
    panel = PanelRuns.of(RecordingArchive.join([archive, RecordingArchive.open(tmp_path)]))
    assert [run.name for run in panel.unlearned] == [f"{TI}/concept_z/0"]
    assert len(panel.runs) == 18


def test_settings_are_chosen_on_all_concepts_that_take_part(archive: RecordingArchive, tmp_path: Path) -> None:
    """A concept whose end runs learned nothing, or that has three images of its own, is one of the others."""
    options: dict[str, Any] = {"header": HEADER, "images": 4, "jitter": 1e-5, "every": 2}
    four = list(CONCEPTS)[:4]
    for concept, counts in ((four[0], (1, 3)), (four[1], (1, 3)), (four[2], (1, 3)), (four[3], (1,))):
        for count in counts:
            setting = {"images": {"value": count, "preset": 5}}
            write_fake_record(tmp_path, TI, concept, cap=200, learned=16.0, setting=setting, **options)
    write_panel_record(tmp_path, "concept_z", 4.0, learned=1e9, cap=60, noise=0.01)
    write_panel_record(tmp_path, "concept_z", learned=16.0)
    panel = PanelRuns.of(RecordingArchive.join([archive, RecordingArchive.open(tmp_path)]))
    assert panel.list_concepts(["images 3"]) == set(four)
    stops, _ = compare_registered(panel)
    assert {run.run.concept for run in stops.presets} == {*CONCEPTS, "concept_z"}
    assert "concept_z" not in {run.run.concept for run in stops.runs}


@pytest.mark.parametrize(
    ("more", "refusal"),
    [
        ({"seed": 1}, "the panel is of seed 0, got textual-inversion/concept_y/1"),
        ({"concept": TUNING[0]}, f"tuning concepts take no part in the panel, got textual-inversion/{TUNING[0]}/0"),
        (
            {"setting": {"learning_rate": {"value": 0.05, "preset": 0.005}}},
            "the panel varies what docs/protocol.md lists, got textual-inversion/concept_y/0,learning_rate=0.05",
        ),
    ],
)
def test_runs_that_the_panel_does_not_plan_are_refused(
    archive: RecordingArchive, tmp_path: Path, more: dict[str, Any], refusal: str
) -> None:
    write_fake_record(tmp_path, TI, **{"concept": "concept_y", "cap": 200, "header": HEADER, **more})
    with pytest.raises(RefusedInput, match=refusal):
        PanelRuns.of(RecordingArchive.join([archive, RecordingArchive.open(tmp_path)]))


def test_a_short_run_is_known_as_one(tmp_path: Path) -> None:
    write_panel_record(tmp_path, "concept_a", learned=16.0, cap=100)
    (run,) = PanelRuns.of(RecordingArchive.open(tmp_path)).runs
    assert run.is_short


def refusal(archive: RecordingArchive) -> str:
    with pytest.raises(RefusedInput) as refused:
        compare_registered(PanelRuns.of(archive))
    return str(refused.value)


def join_one(archive: RecordingArchive, root: Path, **more: Any) -> RecordingArchive:
    write_panel_record(root, "concept_x", learned=16.0, **more)
    return RecordingArchive.join([archive, RecordingArchive.open(root)])


def test_records_of_another_base_model_are_refused_by_name(archive: RecordingArchive, tmp_path: Path) -> None:
    mixed = join_one(archive, tmp_path, header={**HEADER, "base": "b" * 64})
    message = refusal(mixed)
    assert "base model mini must be one and the same, got aaaaaaaaaaaa (" in message
    assert f"bbbbbbbbbbbb ({TI}/concept_x/0)" in message
    assert "and 15 more" in message


def test_records_of_another_protocol_or_version_are_refused_by_name(archive: RecordingArchive, tmp_path: Path) -> None:
    newer = join_one(archive, tmp_path / "a", header={**HEADER, "protocol": {"name": "panel", "version": 2}})
    assert f"panel, version 2 ({TI}/concept_x/0)" in refusal(newer)
    older = join_one(archive, tmp_path / "b", header={})
    assert f"before the panel, version 0 ({TI}/concept_x/0)" in refusal(older)


def test_without_a_run_of_the_panel_the_command_that_records_them_is_named(tmp_path: Path) -> None:
    write_fake_record(tmp_path, cap=40)
    message = refusal(RecordingArchive.open(tmp_path))
    assert message.startswith("no run of the panel was recorded: dvar record --panel all")


def test_too_few_concepts_are_refused_by_name(archive: RecordingArchive) -> None:
    message = refusal(without(archive, lambda run: run.concept > "concept_c"))
    assert "octave − constant needs 6 concepts with runs at learning rates × 1/4, × 4 and × 1, got 3" in message
    assert "(concept_a, concept_b, concept_c): record more with dvar record --panel shift" in message


def test_a_rule_whose_series_a_record_lacks_is_named(archive: RecordingArchive) -> None:
    lacking = archive.runs[0]
    series = {name: values for name, values in lacking._series.items() if name != "stratified"}
    lacking = replace(lacking)
    lacking.__dict__["_series"] = series
    message = refusal(replace(archive, runs=(lacking, *archive.runs[1:])))
    assert "octave, octave, cheap, DVAR, tuned, 64 stratified draws read the series 'stratified', " in message
    assert f"which {lacking.name} lacks: record it again" in message


def test_the_preset_s_rule_is_the_published_one(ends: PanelStops) -> None:
    run: PanelRun = ends.runs[0]
    (stop,) = find_stops((Dvar(200, 0.15, strict_paper=True),), run.run, "eval")
    assert ends.stops[DVAR_PRESET][run] == stop
