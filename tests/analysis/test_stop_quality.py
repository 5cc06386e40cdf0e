"""Stop quality and oracles on curves whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, compute_oracle_step, write_fake_record
from hypothesis import given
from hypothesis import strategies as st

from dvar.analysis.stop_quality import (
    LearningCurve,
    MeanInterval,
    assess_stop,
    bootstrap_mean,
    bootstrap_statistic,
    mean_over_concepts,
    weakest,
)
from dvar.recordings.recorded_run import CHOOSE, REPORT, RecordedRun

STEPS = np.unique(np.rint(np.geomspace(1, 1000, 40)))


def rising_scores(steps: np.ndarray, learned: float = 60.0) -> np.ndarray:
    return START + GAIN * (1 - np.exp(-steps / learned))


def test_a_clean_rise_has_its_plateau_at_the_end() -> None:
    curve = LearningCurve.from_scores(STEPS, rising_scores(STEPS))
    # The mean of 1 - exp(-t / 60) over [500, 1000] is 1 - 60 (e^-8.33 - e^-16.7) / 500, all but 1.
    assert curve.plateau == pytest.approx(START + GAIN, abs=1e-3)
    assert curve.noise == pytest.approx(0)
    assert curve.learned


def test_the_oracle_lies_where_the_truth_puts_it() -> None:
    fine = np.arange(0, 1001)
    curve = LearningCurve.from_scores(fine, rising_scores(fine))
    for share in (0.8, 0.9, 0.95):
        assert curve.step_at(share) == pytest.approx(compute_oracle_step(60.0, share), rel=0.02)


def test_a_decline_does_not_lower_the_plateau() -> None:
    steps = np.arange(0, 1001, 10.0)
    values = rising_scores(steps) - 5e-4 * np.maximum(0, steps - 500)
    curve = LearningCurve.from_scores(steps, values)
    assert values[-1] < START + 0.2 * GAIN
    assert curve.plateau == pytest.approx(START + GAIN, abs=0.01)
    assert curve.gain_at(1000) < 0.2  # and q sees the decline


def test_a_noisy_plateau_is_not_a_decline() -> None:
    random = np.random.default_rng(0)
    plateaus = [
        LearningCurve.from_scores(STEPS, rising_scores(STEPS) + 0.01 * random.standard_normal(len(STEPS))).plateau
        for _ in range(50)
    ]
    assert np.mean(plateaus) == pytest.approx(START + GAIN, abs=0.01)
    assert np.std(plateaus) < 0.01


def test_noise_alone_is_no_learning() -> None:
    random = np.random.default_rng(0)
    learned = [
        LearningCurve.from_scores(STEPS, 0.5 + 0.01 * random.standard_normal(len(STEPS))).learned for _ in range(50)
    ]
    assert np.mean(learned) <= 0.1


@given(st.floats(0.1, 10), st.floats(-5, 5), st.floats(20, 200))
def test_q_and_oracle_do_not_depend_on_the_scores_scale_and_origin(scale: float, shift: float, learned: float) -> None:
    values = rising_scores(STEPS, learned)
    curve, rescaled = LearningCurve.from_scores(STEPS, values), LearningCurve.from_scores(STEPS, shift + scale * values)
    assert curve.step_at() == pytest.approx(rescaled.step_at(), rel=1e-6)
    assert curve.gain_at(100) == pytest.approx(rescaled.gain_at(100), rel=1e-6)


def test_a_stop_at_the_oracle_has_no_distance(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=600))
    curve = LearningCurve.of_run(run)
    at_oracle = assess_stop(run, curve.step_at())
    assert at_oracle.distance == pytest.approx(0)
    assert at_oracle.gain_kept == pytest.approx(0.9)
    assert not at_oracle.premature
    assert not at_oracle.wasteful
    assert assess_stop(run, 4 * curve.step_at()).distance == pytest.approx(2)
    assert assess_stop(run, 4 * curve.step_at()).wasteful
    assert assess_stop(run, curve.step_at() / 2).premature


@pytest.mark.parametrize(("oracle", "counted"), [(0.25, 1.0), (1.5, 1.5)])
def test_an_oracle_before_the_first_step_counts_as_that_step(
    oracle: float, counted: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60))
    monkeypatch.setattr(LearningCurve, "step_at", lambda curve: oracle)
    assert assess_stop(run, 12).distance == pytest.approx(np.log2(12 / counted))


def test_a_stop_and_the_checkpoint_it_keeps_have_distances_of_their_own(tmp_path: Path) -> None:
    """Training on to four oracles is wasteful, whichever checkpoint is kept; its quality is that of the checkpoint."""
    run = RecordedRun.open(write_fake_record(tmp_path, cap=600))
    oracle = LearningCurve.of_run(run).step_at()
    quality = assess_stop(run, 4 * oracle, kept_step=oracle / 2)
    assert quality.distance == pytest.approx(2)
    assert quality.kept_distance == pytest.approx(-1)
    assert quality.wasteful
    assert quality.premature
    assert quality.gain_kept == pytest.approx(LearningCurve.of_run(run).gain_at(oracle / 2))
    assert quality.context_lost == assess_stop(run, oracle / 2).context_lost
    assert assess_stop(run, oracle).kept_distance == assess_stop(run, oracle).distance


@pytest.mark.parametrize("end", [0.4, 0.5])
def test_a_run_that_gains_nothing_has_no_oracle(end: float) -> None:
    """The score starts at 0.5 and never comes back above it."""
    curve = LearningCurve.from_scores([0, 10, 20, 40], [0.5, 0.3, end, end])
    assert not curve.learned
    assert np.isnan(curve.step_at())
    assert np.isnan(curve.gain_at(20))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_an_oracle_is_a_step_of_the_run_or_none(values: list[float]) -> None:
    curve = LearningCurve.from_scores(np.arange(len(values)), values)
    step = curve.step_at()
    assert np.isnan(step) or 0 <= step <= len(values) - 1
    assert np.isnan(step) == (not curve.plateau > curve.start)


def test_a_dip_within_the_noise_is_no_decline() -> None:
    """The last scores lie one standard deviation below a long plateau: the plateau includes them.

    Without a margin the decline would begin at the highest score, and the plateau would be what came before it.
    """
    steps = np.arange(0.0, 1001, 10)
    ripple = 0.01 * (-1) ** np.arange(len(steps))
    values = rising_scores(steps, 30.0) + ripple + 0.004 * (steps == 300)
    curve = LearningCurve.from_scores(steps, values)
    assert len(curve.fit) == len(steps)
    assert curve.plateau == pytest.approx(START + GAIN, abs=0.002)


def test_context_lost_is_the_fall_of_validation_text(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=600))
    context_lost = assess_stop(run, 600).context_lost
    assert context_lost == pytest.approx(0.03 * (1 - np.exp(-10)) + 0.02)


def test_the_halves_are_disjoint(tmp_path: Path) -> None:
    run = RecordedRun.open(write_fake_record(tmp_path, cap=60, noise=0.1))
    _, every = run.scores("train", "clip_image")
    (_, even), (_, odd) = (run.scores("train", "clip_image", which) for which in (CHOOSE, REPORT))
    assert sorted([*even[0], *odd[0]]) == sorted(every[0])
    assert not set(even[0]) & set(odd[0])


def test_concepts_are_resampled_and_not_runs(tmp_path: Path) -> None:
    runs = [
        RecordedRun.open(write_fake_record(tmp_path, concept=name, seed=seed, cap=20))
        for name in "abc"
        for seed in range(4)
    ]
    values = [{"a": 0.0, "b": 1.0, "c": 2.0}[run.concept] for run in runs]
    interval = mean_over_concepts(runs, values)
    assert (interval.mean, interval.concepts) == (1.0, 3)
    assert interval == bootstrap_mean([0.0, 1.0, 2.0])
    # Twelve runs taken for independent would give a narrower interval.
    assert bootstrap_mean(values).high - bootstrap_mean(values).low < 0.7 * (interval.high - interval.low)


def test_an_interval_covers_the_mean_it_estimates() -> None:
    random = np.random.default_rng(1)
    intervals = [bootstrap_mean(random.standard_normal(30)) for _ in range(100)]
    assert 85 <= sum(interval.low < 0 < interval.high for interval in intervals) <= 100


def test_a_bootstrapped_mean_is_the_same_by_either_function() -> None:
    values = np.random.default_rng(2).standard_normal(20)
    mean, other = bootstrap_mean(values), bootstrap_statistic(20, lambda chosen: float(values[chosen].mean()))
    assert other.concepts == 20
    assert other.mean == pytest.approx(mean.mean)
    assert [other.low, other.high] == pytest.approx([mean.low, mean.high], abs=0.05)
    assert np.isnan(bootstrap_statistic(1, lambda chosen: 1.0).low)
    assert np.isnan(bootstrap_statistic(0, lambda chosen: 1.0).mean)
    assert np.isnan(bootstrap_statistic(3, lambda chosen: float("nan")).low)


def test_all_of_several_values_are_above_0_where_the_weakest_is() -> None:
    above, across, below = (MeanInterval(mean, mean - 1, mean + 1, 9) for mean in (2.0, 0.5, -2.0))
    assert weakest([above, above]).low > 0
    assert weakest([above, across]).low < 0 < weakest([above, across]).high
    assert weakest([above, below]).high < 0


def test_two_concepts_have_an_interval_that_is_the_same_every_time() -> None:
    """Of two concepts one is drawn twice in half of the draws, so the interval is from one to the other."""
    interval = bootstrap_statistic(2, lambda chosen: float(np.array([1.0, 3.0])[chosen].mean()))
    assert (interval.mean, interval.low, interval.high, interval.concepts) == (2, 1, 3, 2)
    assert bootstrap_mean([1.0, 3.0]) == interval
    values = np.random.default_rng(3).standard_normal(12)
    assert bootstrap_mean(values) == bootstrap_mean(values)


def test_concepts_that_agree_have_an_interval_without_width() -> None:
    assert bootstrap_mean([2.0, 2.0, 2.0]) == MeanInterval(2.0, 2.0, 2.0, 3)


def test_one_concept_has_no_interval() -> None:
    assert np.isnan(bootstrap_mean([1.0]).low)
    assert np.isnan(bootstrap_mean([]).mean)
