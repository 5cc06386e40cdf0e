"""Prefilter: where a rule could stop, for a whole trace and many thresholds at once."""

# A rule is called on the trace as it was at each step record, which is exact and slow.  The number that it compares
# with its threshold is computed here for all step records together from running sums, which is fast and exact but for
# rounding.  The prefilter names the step records at which a rule need not be called, and leaves the others to the rule:
# if it lets too many through, that costs time, and never changes a stop.

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dvar.stopping.curve import Curve
from dvar.stopping.rule import CONDITION_REASONS
from dvar.stopping.rules import AllOf, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import Trace

Floats = NDArray[np.float64]
Steps = NDArray[np.int64]
Mask = NDArray[np.bool_]
_SLACK, _ROUNDING = 1e-6, 1e-10
"""How much closer to its threshold a number may be than computed: relative to itself, and to the losses' range."""


class Prefilter:
    """Finds where rules could stop on one trace; intermediate results are kept for the next rule."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._steps: Steps = np.array([row["step"] for row in trace.records], np.int64)
        self._cache: dict[Any, Any] = {}

    def __call__(self, rule: Rule) -> Mask:
        """Return at which step records the rule could stop, [step records]; at all of them for an unknown rule."""
        everywhere = np.ones(len(self._steps), np.bool_)
        if isinstance(rule, FixedSteps):
            return self._steps >= rule.max_steps
        if isinstance(rule, AllOf):
            parts: Mask = np.logical_and.reduce([self(part) for part in rule.rules])
            return parts
        if not isinstance(rule, Dvar | EmaPercentile | Hall | Trend | Plateau):
            return everywhere
        first = 1 if isinstance(rule, Dvar) and rule.strict_paper else 0
        sums = self._once(
            ("curve", rule.metric, first), lambda: _RunningSums(Curve.from_trace(self._trace, rule.metric, first))
        )
        # The rule also stops for other reasons than its condition, or the sums mean nothing.
        if not set(rule.stop_on) <= set(CONDITION_REASONS) or not sums.usable:
            return everywhere
        if isinstance(rule, Plateau):
            best = self._once(
                (rule.metric, rule.mode, rule.min_delta), lambda: sums.last_improvement(rule.mode, rule.min_delta)
            )
            candidates = sums.curve.steps - best >= rule.patience
        else:
            measure, names = _MEASURES[type(rule)]
            settings = tuple(getattr(rule, name) for name in names)
            size, rounding = self._once((type(rule), rule.metric, first, *settings), lambda: measure(sums, *settings))
            candidates = (size < rule.threshold * (1 + _SLACK) + rounding) & (sums.span >= rule.window)
        return self._extend(sums.curve.steps, candidates)

    def _extend(self, steps: Steps, candidates: Mask) -> Mask:
        """Return for each step record what holds at the last value of the curve before or at it."""
        last = np.searchsorted(steps, self._steps, side="right") - 1
        mask: Mask = candidates[last] & (last >= 0)
        return mask

    def _once(self, key: Any, compute: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = compute()
        return self._cache[key]


class _RunningSums:
    """A curve with its running sums: the sum over any window is the difference of two."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    @property
    def usable(self) -> bool:
        """Whether there is anything to sum."""
        return len(self.curve) > 1 and bool(np.isfinite(self.curve.spread)) and self.curve.spread > 0

    @cached_property
    def span(self) -> Steps:
        """Steps from the first value to each, [n]."""
        span: Steps = self.curve.steps - self.curve.steps[0]
        return span

    @cached_property
    def _scaled(self) -> Floats:
        scaled: Floats = (self.curve.values - self.curve.values[0]) / self.curve.spread
        return scaled

    def _sums(self, window: int | None, *factors: Floats) -> Floats:
        """Return the weighted sum of the product of the factors over the window before each value, or all before it."""
        values = np.prod(factors, axis=0) if factors else np.ones(len(self.curve))
        sums: Floats = np.concatenate([[0.0], np.cumsum(self.curve.weights * values)])
        if window is None:
            return sums[1:]
        before = self.curve.steps - window
        start = np.searchsorted(self.curve.steps, before, side="right")
        cut = np.maximum(self.curve.weights[start] - (self.curve.steps[start] - before), 0.0)
        windowed: Floats = sums[1:] - sums[start] - cut * values[start]
        return windowed

    def variance(self, window: int | None, ddof: int) -> Floats:
        """Return the variance in units of the squared spread, [n]."""
        x, count = self._scaled, self._sums(window)
        mean = self._sums(window, x) / count
        return (self._sums(window, x, x) / count - mean * mean) * count / np.maximum(count - ddof, 1.0)

    def ratio(self, window: int, ddof: int) -> tuple[Floats, Floats]:
        """Return DVAR's ratio of variances, [n], and how far rounding may have changed it."""
        total = np.maximum(self.variance(None, ddof), _ROUNDING * _ROUNDING)
        return self.variance(window, ddof) / total, _ROUNDING / total

    def change(self, window: int, alpha: float) -> tuple[Floats, float]:
        """Return the relative change of the moving average, [n], 0 where that is undefined, and the rounding."""
        values, gaps = self.curve.values, np.diff(self.curve.steps)
        average = [float(values[0])]
        for value, weight in zip(values[1:].tolist(), (1 - (1 - alpha) ** gaps).tolist(), strict=True):
            average.append(average[-1] + weight * (value - average[-1]))
        before = np.interp(self.curve.steps - window, self.curve.steps, average)
        change = np.abs(np.array(average) - before) / np.where(before > 0, before, np.inf)
        return change, _ROUNDING

    def range(self, window: int) -> tuple[Floats, float]:
        """Return (highest - lowest) / highest, [n], 0 where that is undefined, and the rounding.

        Over the mean instead of the highest the quotient is no smaller.
        """
        steps = np.arange(self.curve.steps[0], self.curve.steps[-1] + 1)
        line = np.interp(steps, self.curve.steps, self.curve.values)
        windows = sliding_window_view(np.concatenate([np.full(window - 1, line[0]), line]), window)
        high, low = windows.max(axis=1)[self.span], windows.min(axis=1)[self.span]
        return (high - low) / np.where(high > 0, high, np.inf), _ROUNDING

    def slope(self, window: int) -> tuple[Floats, float]:
        """Return the size of the slope of the least-squares line, [n], and the rounding."""
        length = float(self.span[-1])
        x, y, count = self.span / length, self._scaled, self._sums(window)
        mean_x, mean_y = self._sums(window, x) / count, self._sums(window, y) / count
        variance = self._sums(window, x, x) / count - mean_x * mean_x
        slope = (self._sums(window, x, y) / count - mean_x * mean_y) / np.maximum(variance, _ROUNDING)
        unit = self.curve.spread / length
        return np.abs(slope) * unit, 1e-4 * unit

    def last_improvement(self, mode: str, min_delta: float) -> Steps:
        """Return the step of the last improvement before or at each value, [n]."""
        values = (self.curve.values if mode == "max" else -self.curve.values).tolist()
        best, best_index, indices = values[0], 0, []
        for index, value in enumerate(values):
            if value > best + min_delta:
                best, best_index = value, index
            indices.append(best_index)
        steps: Steps = self.curve.steps[indices]
        return steps


_MEASURES: dict[type, tuple[Callable[..., Any], tuple[str, ...]]] = {
    Dvar: (_RunningSums.ratio, ("window", "ddof")),
    EmaPercentile: (_RunningSums.change, ("window", "alpha")),
    Hall: (_RunningSums.range, ("window",)),
    Trend: (_RunningSums.slope, ("window",)),
}
"""What each rule compares with its threshold, and the settings it depends on apart from the metric."""
