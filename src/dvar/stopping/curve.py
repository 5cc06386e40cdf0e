"""A stretch of one metric, weighted by steps, and its statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dvar.stopping.trace import LOSS, Trace

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """A stretch of one metric, each value weighted by the steps it stands for.

    A record stands for the steps since the record before it; the first stands for its own step alone. At cadence 1
    every weight is 1, and every statistic is the unweighted one.

    Args:
        steps: [n] steps in rising order.
        values: [n] values of the metric.
        weights: [n] numbers of steps.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def from_trace(cls, trace: Trace, metric: str = LOSS, first_step: int = 0) -> Curve:
        """Return the curve of ``metric`` from ``first_step`` on, as if no record had been made before.

        Where the trace itself is judged from a later step on, that one counts.

        Raises:
            TraceError: As `Trace.metric`.
        """
        first_step = max(first_step, trace.judged_from)
        return trace.derive(("curve", metric, first_step), lambda: cls._read(trace, metric, first_step))

    @classmethod
    def _read(cls, trace: Trace, metric: str, first_step: int) -> Curve:
        steps, values = trace.metric(metric)
        start = int(steps.searchsorted(first_step))
        steps, values = steps[start:], values[start:]
        weights = np.empty(len(steps))  # whole numbers, in float64 because all sums are
        weights[:1], weights[1:] = 1, steps[1:] - steps[:-1]
        return cls(steps, values, weights)

    def last(self, window: int) -> Curve:
        """Return the records with a step in (t - window, t], where t is the newest step.

        Of the steps that the oldest of them stands for, only those inside the window count. Otherwise a window read at
        a coarse cadence would be wider than one read at every step, and the same curve would stop up to three cadences
        later.
        """
        return self.derive(("last", window), lambda: self._last(window))

    def derive(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what ``compute`` gives, computed once for each key: a curve never changes."""
        if key not in self._derived:
            self._derived[key] = compute()
        value: T = self._derived[key]
        return value

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def _last(self, window: int) -> Curve:
        before = self.steps[-1] - window
        start = int(self.steps.searchsorted(before, side="right"))
        weights = np.minimum(self.weights[start:], self.steps[start:] - before)
        return Curve(self.steps[start:], self.values[start:], weights)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def span(self) -> int:
        """Number of steps from the first record to the last."""
        return int(self.steps[-1] - self.steps[0])

    @cached_property
    def spread(self) -> float:
        """Largest minus smallest value; not finite if one value is not."""
        return float(self.values.max()) - float(self.values.min())

    @cached_property
    def mean(self) -> float:
        """Weighted mean."""
        return float(self.values[0] + np.dot(self.weights / np.sum(self.weights), self.values - self.values[0]))

    def variance(self, unit: float, ddof: int = 0) -> float:
        """Return the weighted variance in units of ``unit`` squared, in two passes in float64.

        A weight w counts as w values. The first value is subtracted first, so that a constant curve has a variance of
        exactly 0; the unit keeps the squares of very large or small losses within the range of float64.
        """
        return self.derive(("variance", unit, ddof), lambda: self._variance(unit, ddof))

    def _variance(self, unit: float, ddof: int) -> float:
        values, count = (self.values - self.values[0]) / unit, self.weights.sum()
        deviations = values - np.dot(self.weights, values) / count
        return float(np.dot(self.weights, deviations * deviations) / (count - ddof))

    def slope(self) -> float:
        """Return the slope per step of the weighted least-squares line: sum(w x y) / sum(w x x), x and y centred."""
        return self.derive("slope", self._slope)

    def _slope(self) -> float:
        ages = self.steps - np.dot(self.weights, self.steps) / np.sum(self.weights)
        weighted = self.weights * ages
        return float(np.dot(weighted / np.dot(weighted, ages), self.values - self.values[0]))

    def slope_error(self, unit: float) -> float:
        """Return the standard error of `slope`, corrected for autocorrelation; ``unit`` as in `variance`.

        With r the correlation of neighbouring residuals, n records carry as much information as n (1 - r) / (1 + r)
        independent ones. A negative r is taken as 0, so that the correction never makes the error smaller.
        """
        return self.derive(("slope error", unit), lambda: self._slope_error(unit))

    def _slope_error(self, unit: float) -> float:
        ages = self.steps - np.dot(self.weights, self.steps) / np.sum(self.weights)
        values = (self.values - self.values[0]) / unit
        values = values - np.dot(self.weights, values) / np.sum(self.weights)
        residuals = values - ages * (np.dot(self.weights * ages, values) / np.dot(self.weights * ages, ages))
        squares = float(np.dot(residuals, residuals))
        if not squares:
            return 0.0
        correlation = min(max(float(np.dot(residuals[1:], residuals[:-1])) / squares, 0.0), 1 - 1 / len(self))
        error = squares / (len(self) - 2) / float(np.dot(ages, ages)) * (1 + correlation) / (1 - correlation)
        return math.sqrt(error) * unit

    def interpolate(self, step: float) -> float:
        """Return the value at any step from the first to the last, interpolated linearly between records."""
        return float(np.interp(step, self.steps, self.values))
