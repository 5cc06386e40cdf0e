"""What every rule does alike: it checks its settings, reads its metric, and turns a condition into a verdict.

A rule that reads a window calls `read`, then `not_yet` for the verdict where there is nothing to judge, then `judged`
with whether its condition holds.  The checks return problems, one line each, for `refuse` to raise together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any, Protocol

import numpy as np

from dvar.errors import RefusedInput, TraceError
from dvar.stopping.curve import Curve
from dvar.stopping.diagnosis import Reason, diagnose
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

MIN_RECORDS = 8
"""A window that holds fewer records is not judged."""

SETTLED = (
    Reason.STABILISED,
    Reason.NOT_LEARNING,
    Reason.STILL_FALLING,
    Reason.RISING,
    Reason.OUTLIER_DOMINATED,
)
"""The reasons a rule's condition can hold for; each with a truth of its own, all of them a stop in the paper."""
STOPS_ON = (Reason.STABILISED, Reason.NOT_LEARNING, Reason.RISING)
"""The default of `stop_on`: go on while the loss still falls or one outlier feigns a fall; more steps mend neither a
loss that rises nor one that settled without a gain."""


class Rule(Protocol):
    """Anything that gives a verdict on a trace."""

    def __call__(self, trace: Trace) -> Verdict:
        """The verdict at the newest record of `trace`."""
        ...


class Windowed(Protocol):
    """A rule that reads the last `window` steps of one metric."""

    @property
    def window(self) -> int: ...
    @property
    def stop_on(self) -> tuple[Reason, ...]: ...
    @property
    def metric(self) -> str: ...


class Thresholded(Windowed, Protocol):
    """A rule of Appendix E: a window, and a threshold for one number that is measured over it."""

    @property
    def threshold(self) -> float: ...


def read(rule: object, trace: Trace, metric: str, patience: int, first_step: int = 0) -> Curve:
    """What the rule judges.  A metric may come late, but not later than the rule would have been ready to judge it."""
    name = type(rule).__name__
    if not isinstance(trace, Trace):
        raise RefusedInput(
            f"{name} is called on a Trace, got {type(trace).__name__}: "
            "record the losses first, trace.record(step, losses)"
        )
    try:
        curve = Curve.of(trace, metric, first_step)
    except TraceError as error:
        raise RefusedInput([f"{name} cannot use its metric: {error}"]) from error
    if not len(curve) and trace.last_step - max(trace.first_step, first_step) >= patience:
        there = ", ".join(trace.metric_names) or "no metric at all"
        raise RefusedInput(
            [
                f"{name} reads {metric!r}, which no record up to step {trace.last_step} holds: "
                f"record it, or name one of those recorded ({there})"
            ]
        )
    return curve


def not_yet(rule: Windowed, curve: Curve, trace: Trace, metrics: dict[str, float]) -> Verdict | None:
    """The verdict where there is nothing to judge; `metrics` then tell how much has been seen."""
    metrics |= {"window": rule.window, "seen": 0, "records": 0}
    if not len(curve):
        return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(rule), metrics)
    step = int(curve.steps[-1])
    metrics |= {
        "seen": curve.span,
        "records": len(curve) - int(curve.steps.searchsorted(step - rule.window, side="right")),
    }
    spread = curve.spread
    if not math.isfinite(spread):
        return non_finite(rule, curve, metrics, rule.stop_on)
    if curve.span < rule.window or metrics["records"] < MIN_RECORDS:
        return Verdict(False, Reason.WARMING_UP, step, repr(rule), metrics)
    if not spread:
        found = partial(diagnose, curve, rule.window)
        return Verdict(Reason.NO_CHANGE in rule.stop_on, Reason.NO_CHANGE, step, repr(rule), metrics, found)
    return None


def non_finite(rule: object, curve: Curve, metrics: dict[str, float], stop_on: tuple[Reason, ...]) -> Verdict:
    """The verdict on a curve with a value that is not finite; `metrics` then tell from which step to which."""
    # Finite values too far apart for float64 have no finite spread either: then the furthest are named.
    bad = ~np.isfinite(curve.values)
    if not bad.any():
        bad = np.abs(curve.values) >= np.abs(curve.values).max() / 2
    steps = curve.steps[bad]
    metrics |= {
        "non_finite_step": int(steps[0]),
        "non_finite_last": int(steps[-1]),
        "non_finite_records": len(steps),
    }
    stop = Reason.NON_FINITE in stop_on
    return Verdict(stop, Reason.NON_FINITE, int(curve.steps[-1]), repr(rule), metrics)


def judged(
    rule: Windowed, curve: Curve, metrics: dict[str, float], holds: bool, threshold: float | None = None
) -> Verdict:
    """The verdict once the rule's condition is known; the curve is examined only if it holds, or when asked for."""
    verdict = partial(Verdict, step=int(curve.steps[-1]), rule=repr(rule))
    if not holds:
        found = partial(diagnose, curve, rule.window, threshold)
        return verdict(False, Reason.RUNNING, metrics=metrics, diagnose=found)
    doubts = diagnose(curve, rule.window, threshold)
    reason = doubts[0].reason if doubts else Reason.STABILISED
    metrics = {**(doubts[0].metrics if doubts else {}), **metrics}
    return verdict(reason in rule.stop_on, reason, metrics=metrics, diagnose=lambda: doubts)


def below_threshold(
    rule: Thresholded, trace: Trace, name: str, measure: Callable[[Curve], dict[str, float]]
) -> Verdict:
    """The verdict of a rule that stops once one number, `name` among those `measure` gives, is near enough to 0."""
    curve = read(rule, trace, rule.metric, rule.window)
    metrics: dict[str, float] = {"threshold": rule.threshold}
    if early := not_yet(rule, curve, trace, metrics):
        return early
    metrics |= measure(curve)
    return judged(rule, curve, metrics, abs(metrics[name]) < rule.threshold)


def refuse_level(rule: object, level: float, step: int) -> None:
    """Raise when what the rule divides by is not positive."""
    if not level > 0:
        raise RefusedInput(
            [
                f"{type(rule).__name__} divides by the level of the loss, which is {level:.6g} at step {step}: "
                "use Dvar or Trend for a loss that is not positive, such as a paired one"
            ]
        )


def written(rule: Any) -> str:
    """The rule as it would be written in Python, less what is left at its default."""
    told = [
        f"{item.name}={getattr(rule, item.name)!r}" for item in fields(rule) if getattr(rule, item.name) != item.default
    ]
    return f"{type(rule).__name__}({', '.join(told)})"


def refuse(problems: list[str]) -> None:
    if problems:
        raise RefusedInput(problems)


def window_problems(window: Any) -> list[str]:
    if whole(window) and window >= MIN_RECORDS:
        return []
    return [f"window must be a whole number of steps, {MIN_RECORDS} or more, got {window!r}"]


def below_threshold_problems(rule: Thresholded) -> list[str]:
    """What is wrong with the settings that the rules of Appendix E share."""
    problems = window_problems(rule.window)
    if not real(rule.threshold) or not 0 < rule.threshold < math.inf:
        problems.append(f"threshold must be a finite number above 0, got {rule.threshold!r}")
    return problems + reason_problems(rule.stop_on)


def reason_problems(
    stop_on: Any, allowed: tuple[Reason, ...] = (*SETTLED, Reason.NO_CHANGE, Reason.NON_FINITE)
) -> list[str]:
    if isinstance(stop_on, tuple) and stop_on and all(reason in allowed for reason in stop_on):
        return []
    names = ", ".join(repr(reason) for reason in allowed)
    return [f"stop_on must be a tuple of one or more of {names}, got {stop_on!r}"]


def whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
