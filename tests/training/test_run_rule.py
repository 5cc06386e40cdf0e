"""The rule that a run names: what it is built from, what could never stop, and when the held batch is evaluated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import generate_trace, write_run
from short_run import Outcome, short_run

from dvar.config import training
from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.presets import configure, configure_to_cap
from dvar.runs.replay import read_own_settings
from dvar.runs.report import render_report
from dvar.runs.run_folder import RunFolder
from dvar.stopping.octave import Octave
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps
from dvar.stopping.trace import Trace
from dvar.studio.library import find_run
from dvar.studio.views import predict, show_charts, show_run
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise
from dvar.training.rule import problems, rule_of


def config_of(**settings: Any) -> TextualInversionConfig:
    return configure({"instance_data_dir": "images", "initializer_token": "mug", **settings}, TextualInversionConfig)


@pytest.mark.parametrize(
    ("name", "condition"),
    [("dvar", Dvar(200, 0.15)), ("paper", Dvar(200, 0.15, strict_paper=True)), ("octave", Octave())],
)
def test_a_run_ends_by_the_rule_that_it_names_or_at_its_cap(name: str, condition: Any) -> None:
    assert rule_of(config_of(rule=name, max_train_steps=900)) == AnyOf((condition, FixedSteps(900)))


def test_octave_brings_what_it_reads_unless_something_else_is_named() -> None:
    config = config_of(rule="octave")
    assert (config.probes_per_octave, config.eval_batch_size, config.eval_timesteps) == (6, 16, "stratified")
    assert not problems(config)
    assert config_of(rule="octave", eval_batch_size=4).eval_batch_size == 4
    assert config_of(rule="octave", probe_every=5).probes_per_octave is None
    assert config_of().probes_per_octave is None


def test_the_held_batch_is_evaluated_first_from_step_32_on_and_at_the_cap() -> None:
    config = config_of(rule="octave", max_train_steps=100)
    assert [step for step in range(101) if config.is_probed(step)] == [0, 32, 36, 41, 46, 51, 58, 64, 72, 81, 91, 100]
    config = config_of(probe_every=40, max_train_steps=100)
    assert [step for step in range(101) if config.is_probed(step)] == [0, 40, 80, 100]


def test_evaluations_count_from_the_step_from_which_the_rule_judges() -> None:
    settings = {"rule": "octave", "max_train_steps": 400, "train_text_encoder_ti": True}
    config = configure(
        {"instance_data_dir": "i", "initializer_token": "mug", "train_text_encoder_ti_frac": 0.5, **settings},
        DreamBoothLoraConfig,
    )
    assert config.pivot_step == 200
    probed = [step for step in range(201, 401) if config.is_probed(step)]
    assert probed[:7] == [232, 236, 241, 246, 251, 258, 264]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rule": "octave", "max_train_steps": 64}, "stops after 64 steps at the earliest, got max_train_steps 64"),
        (
            {"rule": "octave", "max_train_steps": 200, "probe_every": 26},
            "needs 4 evaluations in the second half of 200 steps, got probe_every 26: evaluate every 25 or more often",
        ),
        ({"probes_per_octave": 6}, "probes_per_octave is for the rule octave, got 6 with dvar: drop it"),
    ],
)
def test_what_could_never_stop_is_refused(settings: dict[str, Any], problem: str) -> None:
    (message,) = problems(config_of(**settings))
    assert problem in message
    if "evaluate every 25" in problem:
        assert not problems(config_of(**{**settings, "probe_every": 25}))


def test_a_low_cap_scales_nothing_that_octave_does_not_read() -> None:
    settings = {"instance_data_dir": "images", "initializer_token": "mug", "max_train_steps": 100, "rule": "octave"}
    config, sentence = configure_to_cap(settings, TextualInversionConfig)
    assert config.window == 200
    assert "validation_steps" in sentence
    assert "window" not in sentence


def test_the_first_samples_are_scored_before_octave_may_stop() -> None:
    config = config_of(rule="octave", best_by="clip", validation_steps=65)
    assert any("at most the first stop (64)" in problem for problem in training.problems(config))
    assert not training.problems(config_of(rule="octave", best_by="clip", validation_steps=64))


class Killed(Exception):
    """The end of a process, between two steps."""


def test_a_run_under_octave_is_probed_as_it_says_and_resumes_bit_for_bit(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    def kill(step: StepRecord) -> None:
        if step.step == 50:
            raise Killed

    octave: dict[str, Any] = {
        "rule": "octave",
        "probes_per_octave": 6,
        "max_train_steps": 90,
        "checkpointing_steps": 40,
    }
    whole, killed = (
        replace(short_run(tiny_model, tiny_images, tmp_path / name), **octave) for name in ("whole", "killed")
    )
    verdict = personalise(whole).verdict
    assert verdict.rule.startswith("Octave(")
    with pytest.raises(Killed):
        personalise(killed, [kill])
    personalise(replace(killed, resume_from_checkpoint="latest"))
    assert Outcome.of(tmp_path / "whole") == Outcome.of(tmp_path / "killed")
    steps = Trace.read(tmp_path / "killed" / "trace.jsonl").steps.tolist()
    assert steps == [step for step in [0, 32, 36, 41, 46, 51, 58, 64, 72, 81, 90] if step <= verdict.step]


def test_the_report_shows_what_octave_compares(tmp_path: Path) -> None:
    trace = generate_trace(rule=AnyOf((Octave(), FixedSteps(1000))))
    verdict = AnyOf((Octave(), FixedSteps(1000)))(trace)
    run = RunFolder.open(write_run(tmp_path, trace, verdict=verdict, rule="octave"))
    step = verdict.step
    assert (run.takes_window, run.ready_step, run.window_at(step)) == (False, 64, step // 2)
    assert run.ratios[-1] == verdict.metrics["octave_gain"] / verdict.metrics["gain"] < Octave().share
    page = render_report(run)
    assert f"the last {step // 2} steps" in page
    assert "What the last doubling of the steps brought" in page
    assert "straight line" not in page
    assert read_own_settings(tmp_path) == {"window": 160, "threshold": 0.15, "rule": ("octave",)}


def test_an_unfinished_run_is_judged_by_its_own_rule(tmp_path: Path) -> None:
    trace = generate_trace(steps=100, rule=Octave())
    run = RunFolder.open(write_run(tmp_path, trace, finished=False, rule="octave"))
    assert run.verdict == Octave()(trace)


def test_the_studio_shows_octave_by_its_name_and_predicts_nothing(tmp_path: Path) -> None:
    write_run(tmp_path / "mug", generate_trace(steps=100, rule=Octave()), finished=False, rule="octave")
    run = find_run(tmp_path, "mug")
    assert run.opened
    assert predict(run.opened) is None
    assert "Gain of the last doubling" in show_charts(run.opened)
    assert "not before step 64" not in show_run(run)
