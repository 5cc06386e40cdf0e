"""Where a rule could stop, found for a whole trace and many thresholds at once.

A rule is judged on the trace as it was at each record, which is exact and slow.  The number that it compares with its
threshold is found for all records together from running sums, which is fast and exact but for rounding.  So a screen
tells the records at which a rule need not be asked, and leaves the rest to the rule: what it lets through too much
costs time, and never changes a stop.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dvar.stopping.curve import Curve
from dvar.stopping.rule import SETTLED
from dvar.stopping.rules import AllOf, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import Trace

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
_SLACK, _ROUNDING = 1e-6, 1e-10
"""How much nearer a number may be to its threshold than it seems: of itself, and of the range of the losses."""


class Prefilter:
    """What is known of one trace beforehand; called with a rule, it returns whether it could stop, [records]."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._steps = np.array([row["step"] for row in trace.records], np.int64)
        self._known: dict[Any, Any] = {}

    def __call__(self, rule: Rule) -> Mask:
        """Whether the rule could stop at each record; everywhere, for a rule that nothing is known of."""
        if isinstance(rule, FixedSteps):
            return self._steps >= rule.max_steps
        if isinstance(rule, AllOf):
            return np.logical_and.reduce([self(part) for part in rule.rules])
        if not isinstance(rule, Dvar | EmaPercentile | Hall | Trend | Plateau):
            return np.ones(len(self._steps), np.bool_)
        first = 1 if isinstance(rule, Dvar) and rule.strict_paper else 0
        found = self._once(("curve", rule.metric, first), lambda: _Running(Curve.of(self._trace, rule.metric, first)))
        # Other stops than those for a condition that holds, or sums that mean nothing: the rule is asked everywhere.
        if not set(rule.stop_on) <= set(SETTLED) or not found.plain:
            return np.ones(len(self._steps), np.bool_)
        if isinstance(rule, Plateau):
            best = self._once(
                (rule.metric, rule.mode, rule.min_delta), lambda: found.improved(rule.mode, rule.min_delta)
            )
            may = found.curve.steps - best >= rule.patience
        else:
            measure, settings = _MEASURES[type(rule)]
            given = tuple(getattr(rule, name) for name in settings)
            size, rounding = self._once((type(rule), rule.metric, first, *given), lambda: measure(found, *given))
            may = (size < rule.threshold * (1 + _SLACK) + rounding) & (found.span >= rule.window)
        return self._held(found.curve.steps, may)

    def _held(self, steps: NDArray[np.int64], may: Mask) -> Mask:
        """What holds at the last value holds until the next one."""
        last = np.searchsorted(steps, self._steps, side="right") - 1
        return may[last] & (last >= 0)

    def _once(self, name: Any, make: Callable[[], Any]) -> Any:
        if name not in self._known:
            self._known[name] = make()
        return self._known[name]


class _Running:
    """A curve and the running sums of it: of a window any sum is the difference of two."""

    def __init__(self, curve: Curve) -> None:
        self.curve = curve

    @property
    def plain(self) -> bool:
        """Whether there is anything to sum."""
        return len(self.curve) > 1 and bool(np.isfinite(self.curve.spread)) and self.curve.spread > 0

    @cached_property
    def span(self) -> NDArray[np.int64]:
        return self.curve.steps - self.curve.steps[0]

    @cached_property
    def _scaled(self) -> Floats:
        return (self.curve.values - self.curve.values[0]) / self.curve.spread

    def _sums(self, window: int | None, *factors: Floats) -> Floats:
        """The weighted sum of the product of the factors over the window of each record, or over all before it."""
        values = np.prod(factors, axis=0) if factors else np.ones(len(self.curve))
        sums = np.concatenate([[0.0], np.cumsum(self.curve.weights * values)])
        if window is None:
            return sums[1:]
        before = self.curve.steps - window
        start = np.searchsorted(self.curve.steps, before, side="right")
        cut = np.maximum(self.curve.weights[start] - (self.curve.steps[start] - before), 0.0)
        return sums[1:] - sums[start] - cut * values[start]

    def variance(self, window: int | None, ddof: int) -> Floats:
        """In units of the spread squared."""
        x, count = self._scaled, self._sums(window)
        mean = self._sums(window, x) / count
        return (self._sums(window, x, x) / count - mean * mean) * count / np.maximum(count - ddof, 1.0)

    def ratio(self, window: int, ddof: int) -> tuple[Floats, Floats]:
        """DVAR's, and how far rounding may have moved it."""
        total = np.maximum(self.variance(None, ddof), _ROUNDING * _ROUNDING)
        return self.variance(window, ddof) / total, _ROUNDING / total

    def change(self, window: int, alpha: float) -> tuple[Floats, float]:
        """That of the moving average, as a share; 0 where it cannot be divided by."""
        values, gaps = self.curve.values, np.diff(self.curve.steps)
        average = [float(values[0])]
        for value, weight in zip(values[1:].tolist(), (1 - (1 - alpha) ** gaps).tolist(), strict=True):
            average.append(average[-1] + weight * (value - average[-1]))
        before = np.interp(self.curve.steps - window, self.curve.steps, average)
        change = np.abs(np.array(average) - before) / np.where(before > 0, before, np.inf)
        return change, _ROUNDING

    def range(self, window: int) -> tuple[Floats, float]:
        """Highest less lowest over the highest: no more than over the mean.  0 where it cannot be divided by."""
        every = np.arange(self.curve.steps[0], self.curve.steps[-1] + 1)
        line = np.interp(every, self.curve.steps, self.curve.values)
        seen = sliding_window_view(np.concatenate([np.full(window - 1, line[0]), line]), window)
        high, low = seen.max(axis=1)[self.span], seen.min(axis=1)[self.span]
        return (high - low) / np.where(high > 0, high, np.inf), _ROUNDING

    def slope(self, window: int) -> tuple[Floats, float]:
        """The size of that of the least-squares line."""
        length = float(self.span[-1])
        x, y, count = self.span / length, self._scaled, self._sums(window)
        left, up = self._sums(window, x) / count, self._sums(window, y) / count
        width = self._sums(window, x, x) / count - left * left
        slope = (self._sums(window, x, y) / count - left * up) / np.maximum(width, _ROUNDING)
        unit = self.curve.spread / length
        return np.abs(slope) * unit, 1e-4 * unit

    def improved(self, mode: str, min_delta: float) -> NDArray[np.int64]:
        """The step of the last improvement before or at each record."""
        values = (self.curve.values if mode == "max" else -self.curve.values).tolist()
        best, at, found = values[0], 0, []
        for index, value in enumerate(values):
            if value > best + min_delta:
                best, at = value, index
            found.append(at)
        return self.curve.steps[found]


_MEASURES: dict[type, tuple[Callable[..., Any], tuple[str, ...]]] = {
    Dvar: (_Running.ratio, ("window", "ddof")),
    EmaPercentile: (_Running.change, ("window", "alpha")),
    Hall: (_Running.range, ("window",)),
    Trend: (_Running.slope, ("window",)),
}
"""What each rule compares with its threshold, and the settings that it depends on beside the metric."""
