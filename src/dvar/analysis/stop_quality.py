"""How good a stop was: the score's way up along a run, the step where it was nearly there, and means over concepts.

The pictures of a record are two halves, even and odd, of the same prompts and other seeds.  Whatever chooses a step by
looking at pictures looks at the even ones (`CHOOSE`); everything is reported on the odd ones (`REPORT`).  So no way
gains from the luck of the pictures it chose by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression
from scipy.stats import bootstrap

from dvar.recordings.archive import Part, RecordedRun

Floats = NDArray[np.float64]
Half = Literal[0, 1]
CHOOSE: Half = 0
REPORT: Half = 1
SCORE = "clip_image"
"""The score of training pictures that quality is made of: Train CLIP image, as in the paper."""
ORACLE = 0.9
PREMATURE, WASTEFUL = 0.8, 2.0
_CLEAR_DECLINE, _CLEAR_GAIN = 2.0, 3.0  # in standard deviations about the fit
RESAMPLES = 2000


def half(record: RecordedRun, part: Part, metric: str, which: Half) -> tuple[NDArray[np.int64], Floats]:
    """Steps and the scores of one half of the pictures, [n, pictures / 2]; all of them where there is only one."""
    steps, values = record.scores(part, metric)
    return steps, values[:, which::2] if values.shape[1] > 1 else values


def score(record: RecordedRun, step: float, part: Part, metric: str) -> float:
    """The reported score at any step: the mean over `REPORT`, on the line between the scored steps around it."""
    steps, values = half(record, part, metric, REPORT)
    return float(np.interp(step, steps, values.mean(axis=1)))


@dataclass(frozen=True)
class LearningCurve:
    """The way up of a score: q = (score - start) / (plateau - start).

    ``start`` is the first score; ``plateau`` the mean, over steps, of an isotonic fit over the second half of what lies
    before any decline; ``noise`` the standard deviation of the scores about a fit that rises and then falls.  A decline
    begins where that fit has fallen two of these below its peak.
    """

    steps: Floats
    values: Floats
    fit: Floats
    plateau: float
    noise: float

    @classmethod
    @cache
    def of(cls, record: RecordedRun, which: Half = REPORT, metric: str = SCORE) -> LearningCurve:
        """The climb of a record's training pictures, read on one half of them."""
        steps, values = half(record, "train", metric, which)
        return cls.through(steps, values.mean(axis=1))

    @classmethod
    def through(cls, steps: ArrayLike, values: ArrayLike) -> LearningCurve:
        """The climb of a curve with at least two points."""
        x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
        shape = _up_and_down(y)
        noise = float(np.std(y - shape))
        high = shape >= shape.max() - _CLEAR_DECLINE * noise - 1e-12
        end = int(np.flatnonzero(high)[-1]) + 1
        fit = isotonic_regression(y[:end]).x
        late = x[:end] >= x[end - 1] / 2
        return cls(x, y, fit, _mean_over(x[:end][late], fit[late]), noise)

    @property
    def start(self) -> float:
        return float(self.values[0])

    @property
    def learned(self) -> bool:
        """Whether there is a way up at all: a gain of three standard deviations of the noise."""
        return self.plateau - self.start > max(_CLEAR_GAIN * self.noise, 1e-9)

    def at(self, step: float) -> float:
        """q at any step, read on the scores themselves and not on the fit, which could not fall."""
        return float((np.interp(step, self.steps, self.values) - self.start) / (self.plateau - self.start))

    def reached(self, share: float = ORACLE) -> float:
        """The first step at which the fit reaches q = `share`, between scored steps on the line between them."""
        goal = self.start + share * (self.plateau - self.start)
        after = int(np.searchsorted(self.fit, goal - 1e-12))
        if after == 0:
            return float(self.steps[0])
        low, high = self.fit[after - 1], self.fit[after]
        left, right = self.steps[after - 1], self.steps[after]
        return float(left + (right - left) * (goal - low) / (high - low))


@dataclass(frozen=True)
class StopQuality:
    """What a stop was worth, on one record.

    ``gain_kept`` is q at the stop; ``distance`` log2(stop / oracle); ``context_lost`` by how much Validation CLIP text
    lies below that of the untouched model.
    """

    gain_kept: float
    distance: float
    context_lost: float
    censored: bool

    @property
    def premature(self) -> bool:
        return self.gain_kept < PREMATURE

    @property
    def wasteful(self) -> bool:
        return self.distance > np.log2(WASTEFUL) + 1e-9


def outcome(record: RecordedRun, step: float, censored: bool = False) -> StopQuality:
    """What stopping at `step` was worth; a censored one is taken at the end of the record, as a bound."""
    climb = LearningCurve.of(record)
    text = "clip_text"
    lost = float("nan")
    if ("validation", text) in record.pictures:
        lost = score(record, 0, "validation", text) - score(record, step, "validation", text)
    distance = float(np.log2(max(step, 1.0) / max(climb.reached(), 1.0)))
    return StopQuality(climb.at(step), distance, lost, censored)


@dataclass(frozen=True)
class Estimate:
    """A mean over concepts with its 95 % interval; the interval is nan with fewer than two concepts."""

    mean: float
    low: float
    high: float
    concepts: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


def over_concepts(records: Sequence[RecordedRun], values: Sequence[float]) -> Estimate:
    """The mean of the concepts' means, with a percentile interval from resampling concepts.

    Seeds and methods of one concept are not independent, so it is concepts that are resampled.  Values that are not
    finite are left out.
    """
    by_concept: dict[str, list[float]] = {}
    for record, value in zip(records, values, strict=True):
        if np.isfinite(value):
            by_concept.setdefault(record.concept, []).append(value)
    means = np.array([np.mean(found) for found in by_concept.values()])
    return interval(means)


def interval(means: Iterable[float]) -> Estimate:
    """The mean of independent values and its bootstrapped 95 % interval."""
    kept = np.asarray(list(means), np.float64)
    if not kept.size:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean = float(kept.mean())
    if kept.size < 2:
        return Estimate(mean, float("nan"), float("nan"), 1)
    if np.ptp(kept) == 0:
        return Estimate(mean, mean, mean, kept.size)
    found = bootstrap((kept,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return Estimate(mean, float(low), float(high), kept.size)


def _up_and_down(values: Floats) -> Floats:
    """The least-squares fit that rises to a peak and falls after it; of equally good peaks the last."""
    best, least = values, np.inf
    for peak in range(1, len(values) + 1):
        rising = isotonic_regression(values[:peak]).x
        falling = isotonic_regression(values[peak:], increasing=False).x if peak < len(values) else values[:0]
        fit = np.concatenate([rising, falling])
        error = float(np.square(fit - values).sum())
        if error <= least + 1e-15:
            best, least = fit, error
    return best


def _mean_over(steps: Floats, values: Floats) -> float:
    if len(steps) < 2:
        return float(values[-1])
    return float(np.trapezoid(values, steps) / (steps[-1] - steps[0]))
