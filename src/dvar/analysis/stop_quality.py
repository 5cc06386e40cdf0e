"""How good a stop is: learning curves, oracles, and means over concepts with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import SupportsFloat

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import bootstrap

from dvar.recordings.recorded_run import REPORT, SCORE, Half, Part, RecordedRun

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
ORACLE = 0.9
"""Share of a run's gain at which its oracle is."""
PREMATURE, WASTEFUL = 0.8, 2.0
"""A stop is premature with less than this share of the gain, wasteful at more than this multiple of the oracle."""
RESAMPLES = 2000
MIN_CONCEPTS = 6
"""Concepts that a comparison needs: of five, all agree in sign by chance more often than in 5 % of cases (2 / 2^5)."""
_CLEAR_DECLINE, _CLEAR_GAIN = 2.0, 3.0  # in standard deviations about the fit


def reported_score(run: RecordedRun, step: float, part: Part, metric: str) -> float:
    """Return the mean score of the images in `REPORT` at any step, interpolated linearly between scored steps."""
    steps, values = run.scores(part, metric, REPORT)
    return float(np.interp(step, steps, values.mean(axis=1)))


@dataclass(frozen=True)
class LearningCurve:
    """The score of a run's training images over steps, and the gain q = (score - start) / (plateau - start).

    Attributes:
        steps: Scored steps, [n].
        values: The score at each, [n].
        fit: An isotonic fit to what lies before any decline, [at most n].
        plateau: The mean of the fit over the second half of its steps.
        noise: The standard deviation of the scores about a fit that rises and then falls. A decline begins where that
            fit has fallen two of these below its peak.
    """

    steps: Floats
    values: Floats
    fit: Floats
    plateau: float
    noise: float

    @classmethod
    @cache
    def of_run(cls, run: RecordedRun, half: Half = REPORT, metric: str = SCORE) -> LearningCurve:
        """Return the learning curve of a recorded run, computed from one half of its images."""
        steps, values = run.scores("train", metric, half)
        return cls.from_scores(steps, values.mean(axis=1))

    @classmethod
    def from_scores(cls, steps: ArrayLike, values: ArrayLike) -> LearningCurve:
        """Return the learning curve through two or more scores, [n] each."""
        x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        shape = _fit_rise_and_fall(y)
        noise = float(np.std(y - shape))
        before_decline = shape >= shape.max() - _CLEAR_DECLINE * noise - 1e-12
        end = int(np.flatnonzero(before_decline)[-1]) + 1
        fit = isotonic_regression(y[:end]).x
        late = x[:end] >= x[end - 1] / 2
        return cls(x, y, fit, _step_average(x[:end][late], fit[late]), noise)

    @property
    def start(self) -> float:
        """The first score."""
        return float(self.values[0])

    @property
    def learned(self) -> bool:
        """Whether the run gained anything: three standard deviations of the noise or more."""
        return self.plateau - self.start > max(_CLEAR_GAIN * self.noise, 1e-9)

    def gain_at(self, step: float) -> float:
        """Return q at any step, computed from the scores themselves: the fit could not fall; nan without a gain."""
        if not self.plateau > self.start:
            return float("nan")
        return float((np.interp(step, self.steps, self.values) - self.start) / (self.plateau - self.start))

    def step_at(self, share: float = ORACLE) -> float:
        """Return the first step at which the fit reaches q = ``share``, interpolated between scored steps.

        Returns:
            nan where the plateau does not lie above the start, so that nothing was gained.
        """
        if not self.plateau > self.start:
            return float("nan")
        goal = self.start + share * (self.plateau - self.start)
        after = int(np.searchsorted(self.fit, goal - 1e-12))
        if after == 0:
            return float(self.steps[0])
        low, high = self.fit[after - 1], self.fit[after]
        left, right = self.steps[after - 1], self.steps[after]
        return float(left + (right - left) * (goal - low) / (high - low))


@dataclass(frozen=True)
class StopQuality:
    """The quality of a stop, on one run.

    Attributes:
        gain_kept: q of the checkpoint that is kept.
        distance: log2(stop / oracle), in octaves; nan for a run that has no oracle.
        kept_distance: log2(kept step / oracle), in octaves.
        context_lost: How far Validation CLIP text of the kept checkpoint is below that of the untouched model; nan if
            it was not scored.
        censored: Whether the run ended before the strategy stopped, which makes the other values bounds.
    """

    gain_kept: float
    distance: float
    kept_distance: float
    context_lost: float
    censored: bool

    @property
    def premature(self) -> bool:
        """Whether the kept checkpoint has less than `PREMATURE` of the gain."""
        return self.gain_kept < PREMATURE

    @property
    def wasteful(self) -> bool:
        """Whether the stop is later than `WASTEFUL` times the oracle."""
        return bool(self.distance > np.log2(WASTEFUL) + 1e-9)


def assess_stop(
    run: RecordedRun, stop: float, censored: bool = False, *, kept_step: float | None = None
) -> StopQuality:
    """Return how good it is to stop a recorded run at ``stop``, which for a censored stop is the run's last.

    Args:
        run: A recorded run.
        stop: The step that the run is trained to.
        censored: Whether the recording ends before the strategy stops.
        kept_step: The step of the checkpoint that is kept; by default that of the stop.
    """
    curve, kept_step = LearningCurve.of_run(run), stop if kept_step is None else kept_step
    context_lost = float("nan")
    if ("validation", "clip_text") in run.image_scores:
        context_lost = reported_score(run, 0, "validation", "clip_text") - reported_score(
            run, kept_step, "validation", "clip_text"
        )
    oracle = max(curve.step_at(), 1.0)
    distance, kept_distance = (float(np.log2(max(step, 1.0) / oracle)) for step in (stop, kept_step))
    return StopQuality(curve.gain_at(kept_step), distance, kept_distance, context_lost, censored)


@dataclass(frozen=True)
class MeanInterval:
    """A mean over concepts with its 95 % interval, which is nan for fewer than two concepts."""

    mean: float
    low: float
    high: float
    concepts: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def mean_over_concepts(runs: Sequence[RecordedRun], values: Sequence[float]) -> MeanInterval:
    """Return the mean of the concepts' means, with an interval from resampling concepts.

    Concepts are resampled, as seeds and methods of one concept are not independent.

    Args:
        values: One for each run; those that are not finite are left out.
    """
    return bootstrap_mean(average_concepts([run.concept for run in runs], values))


def average_concepts(concepts: Sequence[str], values: Sequence[float]) -> list[float]:
    """Return the mean of each concept's values, in the order of the concepts; those that are not finite are left out.

    Args:
        concepts: The concept of each value.
        values: One for each run.
    """
    by_concept: dict[str, list[float]] = {}
    for concept, value in zip(concepts, values, strict=True):
        if np.isfinite(value):
            by_concept.setdefault(concept, []).append(value)
    return [float(np.mean(group)) for group in by_concept.values()]


def bootstrap_mean(values: Iterable[float]) -> MeanInterval:
    """Return the mean of independent values with its bootstrapped 95 % percentile interval."""
    sample = np.asarray(list(values), np.float64)
    if not sample.size:
        return MeanInterval(float("nan"), float("nan"), float("nan"), 0)
    mean = float(sample.mean())
    if sample.size < 2:
        return MeanInterval(mean, float("nan"), float("nan"), 1)
    if np.ptp(sample) == 0:
        return MeanInterval(mean, mean, mean, sample.size)
    result = bootstrap((sample,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    low, high = result.confidence_interval
    return MeanInterval(mean, float(low), float(high), sample.size)


def bootstrap_statistic(concepts: int, statistic: Callable[[Indices], SupportsFloat]) -> MeanInterval:
    """Return a statistic of concepts that is not their mean, with its bootstrapped 95 % percentile interval.

    Args:
        concepts: Number of concepts.
        statistic: From the indices of concepts, in which some come several times, to the value; nan where they have
            none.
    """
    value = float(statistic(np.arange(concepts))) if concepts else float("nan")
    if concepts < 2:
        return MeanInterval(value, float("nan"), float("nan"), concepts)
    random = np.random.default_rng(0)
    values = np.array([float(statistic(random.integers(concepts, size=concepts))) for _ in range(RESAMPLES)])
    if not np.isfinite(values).any():
        return MeanInterval(value, float("nan"), float("nan"), concepts)
    low, high = np.nanpercentile(values, (2.5, 97.5))
    return MeanInterval(value, float(low), float(high), concepts)


def weakest(intervals: Sequence[MeanInterval]) -> MeanInterval:
    """Return the interval of the least of several values, for a claim that all of them are above 0.

    It lies above 0 if all do, and below 0 if one does.
    """
    least = [min(getattr(interval, name) for interval in intervals) for name in ("mean", "low", "high", "concepts")]
    return MeanInterval(least[0], least[1], least[2], int(least[3]))


def _fit_rise_and_fall(values: Floats) -> Floats:
    """Return the least-squares fit that rises to a peak and then falls; of equally good peaks the last one."""
    best, least = values, np.inf
    for peak in range(1, len(values) + 1):
        rising = isotonic_regression(values[:peak]).x
        falling = isotonic_regression(values[peak:], increasing=False).x if peak < len(values) else values[:0]
        fit = np.concatenate([rising, falling])
        error = float(np.square(fit - values).sum())
        if error <= least + 1e-15:
            best, least = fit, error
    return best


def _step_average(steps: Floats, values: Floats) -> float:
    """Return the mean of a curve over steps, by the trapezoidal rule."""
    if len(steps) < 2:
        return float(values[-1])
    return float(np.diff(steps) @ (values[1:] + values[:-1]) / 2 / (steps[-1] - steps[0]))
