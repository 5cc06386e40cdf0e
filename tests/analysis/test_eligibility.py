"""Eligibility, on runs constructed so that each figure is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, write_fake_record

from dvar.analysis import strategies
from dvar.analysis.eligibility import MIN_RUNS, Eligibility, judge_eligibility
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import RecordedRun
from dvar.stopping.trace import Trace

STEPS, CAP = (0, 25, 50, 100), 100
TUNING = tuple(f"tuning_{number}" for number in range(MIN_RUNS))


def generate_loss(drop: float) -> np.ndarray:
    """Return an L_det that falls by ``drop`` at once and then alternates by 0.001 about its end."""
    return np.array([1.0, *(1.0 - drop + 0.0005 * (-1) ** step for step in range(1, CAP + 1))])


def test_a_method_that_learns_early_passes_with_the_figures_it_has() -> None:
    eligibility = Eligibility.from_scores(
        CAP, STEPS, [[0.1, 0.5, end, end] for end in (0.68, 0.70, 0.72)], [generate_loss(0.1)] * 3, "abc", 0.9
    )
    assert not eligibility.failures
    assert [eligibility.start, eligibility.end, eligibility.early] == pytest.approx([0.1, 0.7, 1.0])
    assert eligibility.errors == pytest.approx(0.6 / (0.02 / np.sqrt(3)))
    assert eligibility.way == pytest.approx(0.75)
    # Differences of the last tenth are +-0.001, five each way: a standard deviation of 0.001 or little less.
    assert eligibility.jitters == pytest.approx(0.1 / (0.001 / np.sqrt(2)), rel=0.02)


@pytest.mark.parametrize(
    ("message", "scores", "drop"),
    [
        ("15 % of the way", [[0.1, 0.15, 0.22, 0.22]] * 3, 0.1),
        ("33 % of its gain by half", [[0.1, 0.1, 0.3, 0.7]] * 3, 0.1),
        ("times its jitter", [[0.1, 0.5, 0.7, 0.7]] * 3, 0.001),
        ("1.7 standard errors", [[0.1, 0.5, 0.7, 0.7], [0.1, 0.1, 0.1, 0.1], [0.1, 0.4, 0.4, 0.4]], 0.1),
    ],
)
def test_each_condition_can_fail_by_itself(message: str, scores: list[list[float]], drop: float) -> None:
    failures = Eligibility.from_scores(CAP, STEPS, scores, [generate_loss(drop)] * 3, "abc", 0.9).failures
    assert len(failures) == 1
    assert message in failures[0]


def test_one_run_cannot_fail_by_an_error_that_it_does_not_have() -> None:
    eligibility = Eligibility.from_scores(CAP, STEPS, [[0.1, 0.5, 0.7, 0.7]], [generate_loss(0.1)], "a")
    assert np.isnan(eligibility.errors)
    assert np.isnan(eligibility.way)
    assert not eligibility.failures


def test_the_standard_error_is_that_of_concepts() -> None:
    """Three seeds of a concept learn alike: they are one observation, and a concept with more seeds weighs no more."""
    ends = {"a": (0.5, 0.5, 0.5), "b": (0.7, 0.7, 0.7), "c": (0.9,)}
    scores = [[0.1, 0.1, end, end] for of_concept in ends.values() for end in of_concept]
    concepts = [concept for concept, of_concept in ends.items() for _ in of_concept]
    eligibility = Eligibility.from_scores(CAP, STEPS, scores, [generate_loss(0.1)] * 7, concepts)
    # Gains of 0.4, 0.6 and 0.8: a mean of 0.6, a standard deviation of 0.2.
    assert eligibility.errors == pytest.approx(0.6 / (0.2 / np.sqrt(3)))
    seeds = Eligibility.from_scores(CAP, STEPS, scores[:3], [generate_loss(0.1)] * 3, "aaa")
    assert np.isnan(seeds.errors)


def test_rough_runs_are_named_and_ranked_all_the_same() -> None:
    """One run of twenty may be rough, two may not; of a run, one gradient above 30 medians or a climb suffices."""
    climbing = generate_loss(0.1)
    climbing[60] = 1.0001
    calm, spiked = np.ones(CAP), np.where(np.arange(CAP) == 70, 31.0, 1.0)
    scores, concepts = [[0.1, 0.5, 0.7, 0.7 + 0.001 * i] for i in range(20)], [f"{i}" for i in range(20)]

    def roughness(rough: int) -> tuple[str, ...]:
        losses = [climbing] * rough + [generate_loss(0.1)] * (20 - rough)
        norms = [spiked] * rough + [calm] * (20 - rough)
        eligibility = Eligibility.from_scores(CAP, STEPS, scores, losses, concepts, 0.9, norms)
        assert not eligibility.failures
        return eligibility.roughness

    assert not roughness(1)
    gradient, climb = roughness(2)
    assert "90 % of its runs have no gradient above 30 times the median" in gradient
    assert "in 90 % of its runs L_det stays below its first value" in climb


def test_norms_that_nobody_recorded_fail_nothing() -> None:
    eligibility = Eligibility.from_scores(CAP, STEPS, [[0.1, 0.5, 0.7, 0.7]], [generate_loss(0.1)], "a")
    assert np.isnan(eligibility.calm)
    assert not eligibility.roughness
    assert eligibility.below == 1.0


def fake_archive(root: Path, tuning: int, learned: float = 60.0) -> RecordingArchive:
    for concept in TUNING[:tuning]:
        write_fake_record(root, "custom-diffusion", concept, cap=700, learned=learned)
    write_fake_record(root, "custom-diffusion", "vase", cap=700)
    return RecordingArchive.open(root, TUNING)


def test_enough_tuning_runs_judge_the_method_up_to_baselines_cap(tmp_path: Path) -> None:
    eligibility = judge_eligibility(fake_archive(tmp_path, MIN_RUNS, learned=40.0), "custom-diffusion")
    assert eligibility is not None
    assert (eligibility.runs, eligibility.cap) == (MIN_RUNS, 500)  # the runs go on to 700
    assert eligibility.start == pytest.approx(START)
    assert eligibility.end == pytest.approx(START + GAIN, abs=1e-3)
    assert not eligibility.failures
    late = judge_eligibility(fake_archive(tmp_path / "late", MIN_RUNS, learned=400.0), "custom-diffusion")
    assert late is not None
    assert "of its gain by half of the cap" in late.failures[0]


@pytest.mark.parametrize(("step", "below"), [(40, 0.0), (41, 1.0)])
def test_the_loss_counts_up_to_the_cap_and_at_it(
    step: int, below: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strategies, "baseline_cap", lambda run: 40)
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, learned=8.0))
    trace = Trace(run.trace.header)
    for record in run.trace.records:
        trace.record(**{**record, **({"eval": [99.0] * 8} if record["step"] == step else {})})
    assert Eligibility.of_runs([replace(run, trace=trace)]).below == below


def test_with_fewer_runs_the_bundled_model_has_its_measured_eligibility_and_another_model_none(tmp_path: Path) -> None:
    few = fake_archive(tmp_path, MIN_RUNS - 1)
    eligibility = judge_eligibility(few, "custom-diffusion")
    assert eligibility is not None
    assert eligibility.early == pytest.approx(0.614, abs=1e-3)  # measured when the settings were frozen
    for run in few:
        run.config["pretrained_model_name_or_path"] = "another"  # type: ignore[index]
    assert judge_eligibility(few, "custom-diffusion") is None


def test_where_a_judge_knows_the_subjects_its_identity_is_what_counts(tmp_path: Path) -> None:
    judged = fake_archive(tmp_path, MIN_RUNS)
    for run in judged:
        rise = 0.2 + 0.6 * (1 - np.exp(-run.scored_steps / 40))
        run.image_scores["train", "identity"] = np.tile(rise[:, None], 8)  # type: ignore[index]
    eligibility = judge_eligibility(judged, "custom-diffusion")
    assert eligibility is not None
    assert eligibility.start == pytest.approx(0.2)
    assert eligibility.end == pytest.approx(0.8, abs=1e-3)
    assert eligibility.ceiling == 1.0
    assert eligibility.way == pytest.approx(0.75, abs=1e-3)
