"""The second clock on records whose memorising step is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_record import space_scored_steps, write_fake_record

from dvar.analysis.memorising import (
    CONSTANT_CLOCK,
    GAP,
    NEVER,
    ClockQuality,
    judge_clocks,
    memorising_step,
    read_gap,
    read_rank_rise,
)
from dvar.analysis.panel import PanelRuns
from dvar.analysis.stop_quality import MeanInterval
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import RecordedRun
from dvar.stopping.trace import Trace

HEADER = {"protocol": {"name": "panel", "version": 1}, "base": "a" * 64}
CAP, LEARNED = 640, 8.0
MEMORISED = {f"concept_{letter}": step for letter, step in zip("abcdef", (40, 60, 90, 160, 240, 320), strict=True)}
"""The step from which on each concept is memorised, long after it is learned."""


def write_record(root: Path, concept: str, memorised: float | None, **more: Any) -> Path:
    options: dict[str, Any] = {"header": HEADER, "images": 4, "jitter": 1e-5, "every": 4, **more}
    return write_fake_record(root, concept=concept, cap=CAP, learned=LEARNED, memorised=memorised, **options)


def open_panel(root: Path, memorised: Mapping[str, float | None], **more: Any) -> PanelRuns:
    for concept, step in memorised.items():
        write_record(root, concept, step, **more)
    return PanelRuns.of(RecordingArchive.open(root))


@pytest.fixture(scope="module")
def panel(tmp_path_factory: pytest.TempPathFactory) -> PanelRuns:
    return open_panel(tmp_path_factory.mktemp("panel"), MEMORISED)


@pytest.fixture(scope="module")
def clocks(panel: PanelRuns) -> dict[str, ClockQuality]:
    return {clock.name: clock for clock in judge_clocks(panel, panel.runs)}


def test_a_run_memorises_from_the_first_scored_step_at_which_it_obeys_less(panel: PanelRuns) -> None:
    for run in panel.runs:
        expected = min(step for step in space_scored_steps(CAP) if step > MEMORISED[run.run.concept])
        assert memorising_step(run) == expected


def test_a_run_that_obeys_to_its_end_never_memorises(tmp_path: Path) -> None:
    (run,) = open_panel(tmp_path, {"concept_a": 2 * CAP}).runs
    assert np.isnan(memorising_step(run))


def test_an_end_that_obeys_again_undoes_what_was_before(tmp_path: Path) -> None:
    (run,) = open_panel(tmp_path, {"concept_a": 40}).runs
    scores = run.run.image_scores["validation", "clip_text"].copy()
    scores[-1] = scores[0]
    recovered = replace(run.run, image_scores={**run.run.image_scores, ("validation", "clip_text"): scores})
    assert np.isnan(memorising_step(replace(run, run=recovered)))


def test_a_change_within_the_noise_of_the_images_is_not_clear(tmp_path: Path) -> None:
    """64 images a half with a standard deviation of 0.02 see a fall of 0.02 an octave, and none of 0 in most runs."""
    options = {"noise": 0.02, "images": 128}
    runs = open_panel(tmp_path, {"concept_a": 80, "concept_b": 2 * CAP, "concept_c": 2 * CAP}, **options).runs
    steps = {run.run.concept: memorising_step(run) for run in runs}
    assert 80 < steps["concept_a"] < 4 * 80
    assert np.isnan(steps["concept_b"])
    assert np.isnan(steps["concept_c"])


def test_the_gap_is_the_rise_on_unseen_renderings_alone(panel: PanelRuns) -> None:
    run = next(run for run in panel.runs if run.run.concept == "concept_a")
    steps, gap = read_gap(run.run)
    expected = np.log(1 + 0.02 * np.maximum(0, np.log2(np.maximum(steps, 1) / 40)))
    np.testing.assert_allclose(gap, expected, atol=1e-4)


def test_the_rank_rises_over_its_least_value_so_far(panel: PanelRuns) -> None:
    trace = Trace()
    for step, rank in enumerate((2.0, 1.0, 1.5, 3.0)):
        trace.record(step, stable_rank=rank)
    run: RecordedRun = replace(panel.runs[0].run, trace=trace)
    assert read_rank_rise(run)[1].tolist() == [0, 0, 0.5, 2]


def test_a_signal_that_knows_is_supported_and_one_that_does_not_is_not(clocks: dict[str, ClockQuality]) -> None:
    assert list(clocks) == [CONSTANT_CLOCK, GAP, "drift"], "Textual Inversion has no stable rank"
    gap, constant, drift = clocks[GAP], clocks[CONSTANT_CLOCK], clocks["drift"]
    assert gap.error.mean < 0.2
    assert gap.right.mean == 1
    assert constant.error.mean > 0.8
    assert gap.is_supported
    assert not drift.is_supported
    assert not constant.is_supported
    assert (gap.runs, gap.memorising) == (6, 6)


@pytest.mark.parametrize(
    ("difference", "right", "supported"),
    [
        (MeanInterval(-1.0, -1.5, -0.5, 6), MeanInterval(0.9, 0.7, 1.0, 6), True),
        (MeanInterval(-1.0, -1.5, -0.5, 5), MeanInterval(0.9, 0.7, 1.0, 5), False),  # too few concepts
        (MeanInterval(-0.1, -0.3, 0.1, 6), MeanInterval(0.9, 0.7, 1.0, 6), False),  # no nearer than the constant
        (MeanInterval(-1.0, -1.5, -0.5, 6), MeanInterval(0.6, 0.4, 0.8, 6), False),  # nearer, and wrong too often
    ],
)
def test_what_supports_a_clock(difference: MeanInterval, right: MeanInterval, supported: bool) -> None:
    enough, good = MeanInterval(-1.0, -1.5, -0.5, 6), MeanInterval(0.9, 0.7, 1.0, 6)
    assert ClockQuality(GAP, difference, right, difference, 6, 6, good, enough).is_supported is supported
    assert ClockQuality(GAP, difference, good, enough, 6, 6, right, difference).is_supported is supported


def test_where_no_run_memorises_no_signal_is_supported_and_the_constant_is_never_wrong(tmp_path: Path) -> None:
    """Records of other lengths than those at the preset: a constant that says "never" says so of them too."""
    options: dict[str, Any] = {"header": HEADER, "images": 4, "jitter": 1e-5, "every": 4, "learned": LEARNED}
    for concept in MEMORISED:
        for rate, cap in ((1, CAP), (0.25, 4 * CAP), (4, CAP // 2)):
            setting = {"learning_rate": {"value": 0.005 * rate, "preset": 0.005}} if rate != 1 else {}
            write_fake_record(tmp_path, concept=concept, cap=cap, memorised=8.0 * CAP, setting=setting, **options)
    panel = PanelRuns.of(RecordingArchive.open(tmp_path))
    clocks = judge_clocks(panel, panel.runs)
    assert (clocks[0].runs, clocks[0].memorising) == (18, 0)
    assert clocks[0].error.mean == 0
    assert not any(clock.is_supported for clock in clocks)


def test_a_constant_beyond_a_short_record_never_strikes_in_it(panel: PanelRuns, tmp_path: Path) -> None:
    options: dict[str, Any] = {"header": HEADER, "images": 4, "every": 4, "learned": LEARNED}
    write_fake_record(tmp_path, concept="concept_z", cap=40, memorised=400.0, **options)
    short = PanelRuns.of(RecordingArchive.open(tmp_path)).runs
    constant = judge_clocks(replace(panel, runs=(*panel.runs, *short)), short)[0]
    assert constant.error.mean == 0, "the run does not memorise within its record either"


def test_a_clock_that_rightly_never_strikes_is_right(tmp_path: Path) -> None:
    panel = open_panel(tmp_path, {**MEMORISED, "concept_g": 2 * CAP})
    never = [run for run in panel.runs if run.run.concept == "concept_g"]
    clocks = {clock.name: clock for clock in judge_clocks(panel, never)}
    assert clocks[GAP].error.mean == 0
    assert clocks[GAP].memorising == 0
    others = [np.log2(memorising_step(run)) for run in panel.runs if run not in never]
    assert clocks[CONSTANT_CLOCK].error.mean == pytest.approx(np.log2(NEVER * CAP) - np.median(others))


def test_a_concept_s_own_run_does_not_choose_its_threshold(panel: PanelRuns) -> None:
    own = [run for run in panel.runs if run.run.concept == "concept_a"]
    others = replace(panel, runs=tuple(run for run in panel.runs if run not in own))
    assert repr(judge_clocks(panel, own)) == repr(judge_clocks(others, own)), "intervals of one concept are nan"
