"""Quality and oracles on curves whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, fake_record, oracle_step
from hypothesis import given
from hypothesis import strategies as st

from dvar.analysis.stop_quality import CHOOSE, REPORT, LearningCurve, half, interval, outcome, over_concepts
from dvar.recordings.archive import RecordedRun

STEPS = np.unique(np.rint(np.geomspace(1, 1000, 40)))


def rising(steps: np.ndarray, learned: float = 60.0) -> np.ndarray:
    return START + GAIN * (1 - np.exp(-steps / learned))


def test_a_clean_climb_has_its_plateau_at_the_end() -> None:
    climb = LearningCurve.through(STEPS, rising(STEPS))
    # The mean of 1 - exp(-t / 60) over [500, 1000] is 1 - 60 (e^-8.33 - e^-16.7) / 500, all but 1.
    assert climb.plateau == pytest.approx(START + GAIN, abs=1e-3)
    assert climb.noise == pytest.approx(0)
    assert climb.learned


def test_the_oracle_lies_where_the_truth_puts_it() -> None:
    fine = np.arange(0, 1001)
    climb = LearningCurve.through(fine, rising(fine))
    for share in (0.8, 0.9, 0.95):
        assert climb.reached(share) == pytest.approx(oracle_step(60.0, share), rel=0.02)


def test_a_decline_does_not_lower_the_plateau() -> None:
    steps = np.arange(0, 1001, 10.0)
    values = rising(steps) - 5e-4 * np.maximum(0, steps - 500)
    climb = LearningCurve.through(steps, values)
    assert values[-1] < START + 0.2 * GAIN
    assert climb.plateau == pytest.approx(START + GAIN, abs=0.01)
    assert climb.at(1000) < 0.2  # and q sees the decline


def test_a_noisy_plateau_is_not_a_decline() -> None:
    random = np.random.default_rng(0)
    plateaus = [
        LearningCurve.through(STEPS, rising(STEPS) + 0.01 * random.standard_normal(len(STEPS))).plateau
        for _ in range(50)
    ]
    assert np.mean(plateaus) == pytest.approx(START + GAIN, abs=0.01)
    assert np.std(plateaus) < 0.01


def test_noise_alone_is_no_learning() -> None:
    random = np.random.default_rng(0)
    learned = [LearningCurve.through(STEPS, 0.5 + 0.01 * random.standard_normal(len(STEPS))).learned for _ in range(50)]
    assert np.mean(learned) <= 0.1


@given(st.floats(0.1, 10), st.floats(-5, 5), st.floats(20, 200))
def test_q_and_oracle_do_not_depend_on_the_scores_scale_and_origin(scale: float, shift: float, learned: float) -> None:
    values = rising(STEPS, learned)
    one, other = LearningCurve.through(STEPS, values), LearningCurve.through(STEPS, shift + scale * values)
    assert one.reached() == pytest.approx(other.reached(), rel=1e-6)
    assert one.at(100) == pytest.approx(other.at(100), rel=1e-6)


def test_a_stop_at_the_oracle_scores_nothing(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=600))
    climb = LearningCurve.of(record)
    at_oracle = outcome(record, climb.reached())
    assert at_oracle.distance == pytest.approx(0)
    assert at_oracle.gain_kept == pytest.approx(0.9)
    assert not at_oracle.premature
    assert not at_oracle.wasteful
    assert outcome(record, 4 * climb.reached()).distance == pytest.approx(2)
    assert outcome(record, 4 * climb.reached()).wasteful
    assert outcome(record, climb.reached() / 2).premature


def test_context_lost_is_the_fall_of_validation_text(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=600))
    lost = outcome(record, 600).context_lost
    assert lost == pytest.approx(0.03 * (1 - np.exp(-10)) + 0.02)


def test_the_halves_are_disjoint(tmp_path: Path) -> None:
    record = RecordedRun.open(fake_record(tmp_path, cap=60, noise=0.1))
    _, every = record.scores("train", "clip_image")
    (_, even), (_, odd) = (half(record, "train", "clip_image", which) for which in (CHOOSE, REPORT))
    assert sorted([*even[0], *odd[0]]) == sorted(every[0])
    assert not set(even[0]) & set(odd[0])


def test_concepts_are_resampled_and_not_runs(tmp_path: Path) -> None:
    records = [
        RecordedRun.open(fake_record(tmp_path, concept=name, seed=seed, cap=20)) for name in "abc" for seed in range(4)
    ]
    values = [{"a": 0.0, "b": 1.0, "c": 2.0}[record.concept] for record in records]
    found = over_concepts(records, values)
    assert (found.mean, found.concepts) == (1.0, 3)
    assert found == interval([0.0, 1.0, 2.0])
    # Twelve runs taken for independent would give a narrower interval.
    assert interval(values).high - interval(values).low < 0.7 * (found.high - found.low)


def test_an_interval_covers_the_mean_it_estimates() -> None:
    random = np.random.default_rng(1)
    found = [interval(random.standard_normal(30)) for _ in range(100)]
    assert 85 <= sum(one.low < 0 < one.high for one in found) <= 100


def test_one_concept_has_no_interval() -> None:
    assert np.isnan(interval([1.0]).low)
    assert np.isnan(interval([]).mean)
