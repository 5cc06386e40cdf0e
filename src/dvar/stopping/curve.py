"""A stretch of one metric, weighted by steps, and its statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dvar.stopping.trace import LOSS, Trace


@dataclass(frozen=True)
class Curve:
    """A stretch of one metric, each value weighted by the steps it stands for.

    A record stands for the steps since the one before it; the first stands for its own step alone.  So at cadence 1
    every weight is 1, and every average below is the plain one.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, trace: Trace, metric: str = LOSS, first_step: int = 0) -> Curve:
        """The metric of `trace` from `first_step` on, as if the records before had never been made.

        Raises: TraceError as `Trace.metric` does.
        """
        steps, values = trace.metric(metric)
        start = int(steps.searchsorted(first_step))
        steps, values = steps[start:], values[start:]
        weights = np.empty(len(steps))  # whole numbers, but in the kind that all sums below are taken in
        weights[:1], weights[1:] = 1, steps[1:] - steps[:-1]
        return cls(steps, values, weights)

    def last(self, window: int) -> Curve:
        """The records with a step in (t - window, t], where t is the newest.

        Of the steps that the oldest of them stands for, only those inside count: else a window read at a coarse cadence
        would be wider than one read at every step, and the same curve would stop later, by up to three cadences.
        """
        before = self.steps[-1] - window
        start = int(self.steps.searchsorted(before, side="right"))
        weights = np.minimum(self.weights[start:], self.steps[start:] - before)
        return Curve(self.steps[start:], self.values[start:], weights)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def span(self) -> int:
        """Steps from the first record to the last."""
        return int(self.steps[-1] - self.steps[0])

    @cached_property
    def spread(self) -> float:
        """Largest minus smallest value; not finite as soon as one value is not."""
        return float(self.values.max()) - float(self.values.min())

    @property
    def mean(self) -> float:
        """Weighted mean."""
        return float(self.values[0] + np.dot(self.weights / np.sum(self.weights), self.values - self.values[0]))

    def variance(self, unit: float, ddof: int = 0) -> float:
        """Weighted variance in units of `unit` squared, in two passes over float64; a weight w counts as w values.

        The first value is subtracted first, so that a curve without any change has exactly no variance; the unit keeps
        the squares of very large or small losses within range.
        """
        values, count = (self.values - self.values[0]) / unit, self.weights.sum()
        deviations = values - np.dot(self.weights, values) / count
        return float(np.dot(self.weights, deviations * deviations) / (count - ddof))

    def slope(self) -> float:
        """Change per step of the weighted least-squares line, in closed form: sum(w x y) / sum(w x x), both centred."""
        ages = self.steps - np.dot(self.weights, self.steps) / np.sum(self.weights)
        pulls = self.weights * ages
        return float(np.dot(pulls / np.dot(pulls, ages), self.values - self.values[0]))

    def slope_error(self, unit: float) -> float:
        """Standard error of `slope`, corrected for residuals that follow one another; `unit` as in `variance`.

        With r the correlation of neighbouring residuals, n records say as much as n (1 - r) / (1 + r) independent
        ones.  A negative r is taken as 0, so that no error is ever made smaller.
        """
        ages = self.steps - np.dot(self.weights, self.steps) / np.sum(self.weights)
        values = (self.values - self.values[0]) / unit
        values = values - np.dot(self.weights, values) / np.sum(self.weights)
        residuals = values - ages * (np.dot(self.weights * ages, values) / np.dot(self.weights * ages, ages))
        left = float(np.dot(residuals, residuals))
        if not left:
            return 0.0
        follow = min(max(float(np.dot(residuals[1:], residuals[:-1])) / left, 0.0), 1 - 1 / len(self))
        error = left / (len(self) - 2) / float(np.dot(ages, ages)) * (1 + follow) / (1 - follow)
        return math.sqrt(error) * unit

    def at(self, step: float) -> float:
        """The value at any step from the first to the last, on the straight line between its neighbours."""
        return float(np.interp(step, self.steps, self.values))
