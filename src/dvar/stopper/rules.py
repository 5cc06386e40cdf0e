"""When to stop: frozen dataclasses, each called on a trace and giving a verdict.

A rule keeps nothing between calls: all it knows is the trace, so replaying a recorded run gives what the live run gave,
and resuming is reading the trace.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np

from dvar.errors import RefusedInput
from dvar.stopper.trace import Curve, Trace
from dvar.stopper.verdict import Reason, Verdict, diagnose

MIN_RECORDS = 8
"""A variance of fewer records in the window is not judged."""


class Criterion(Protocol):
    """Anything that gives a verdict on a trace."""

    def __call__(self, trace: Trace) -> Verdict:
        """The verdict at the newest record of `trace`."""
        ...


@dataclass(frozen=True)
class Dvar:
    """Deterministic Variance Evaluation: stop once the variance of L_det over the last `window` steps is less than
    `threshold` times its variance over the whole run.

    Called on a trace, it returns a `Verdict` at the newest evaluation.  Both variances have ddof 0 and weight a record
    by the steps since the one before it (the first by 1).  The window holds the steps in (t - window, t].  Until
    `window` steps have passed since the first record and the window holds `MIN_RECORDS`, the ratio is 1 and the verdict
    "warming up".  A trace in which nothing changed gives "no change" and one with a nan or an infinity "non-finite":
    neither ever stops, since a rule stops for convergence and not for a fault.

    On an exactly straight line the ratio is (window / t)^2, so DVAR stops it window / sqrt(threshold) steps after the
    first record although nothing converges; that step is in the metrics as `straight_line_step`.

    `strict_paper` drops the evaluation of the untouched model.

    Raises: RefusedInput when `window` is not a whole number of at least 8 or `threshold` is not inside (0, 1).
    Source: Section 3.3, Figure 3.
    Deviates: ddof 0 (Figure 3 run in PyTorch has ddof 1); the window is counted in steps at any cadence (the released
    code counts evaluations); the untouched model is evaluated too, unless `strict_paper`.
    """

    window: int
    threshold: float
    strict_paper: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not _whole(self.window) or self.window < MIN_RECORDS:
            problems.append(f"window must be a whole number of steps, {MIN_RECORDS} or more, got {self.window!r}")
        if not _real(self.threshold) or not 0 < self.threshold < 1:
            problems.append(
                f"threshold must lie between 0 and 1, both excluded, got {self.threshold!r}: "
                "it is the share of the total variance below which to stop, such as 0.15"
            )
        if problems:
            raise RefusedInput(problems)

    def __call__(self, trace: Trace) -> Verdict:
        curve = Curve.of(trace, first_step=1 if self.strict_paper else 0)
        metrics = {"ratio": 1.0, "threshold": self.threshold, "window": self.window, "seen": 0, "records": 0}
        if not len(curve):
            return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(self), metrics)

        recent, spread = curve.last(self.window), curve.spread
        metrics |= {
            "seen": curve.span,
            "records": len(recent),
            "straight_line_step": int(curve.steps[0]) + self.window / math.sqrt(self.threshold),
        }
        verdict = partial(Verdict, step=int(curve.steps[-1]), rule=repr(self), metrics=metrics)
        if not math.isfinite(spread):
            metrics["non_finite_step"] = int(curve.steps[np.argmax(~np.isfinite(curve.values))])
            return verdict(False, Reason.NON_FINITE)
        if curve.span < self.window or len(recent) < MIN_RECORDS:
            return verdict(False, Reason.WARMING_UP)
        diagnosed = partial(verdict, diagnose=partial(diagnose, curve, self.window, metrics["straight_line_step"]))
        if not spread:
            return diagnosed(False, Reason.NO_CHANGE)

        window_var, total_var = recent.variance(unit=spread), curve.variance(unit=spread)
        metrics |= {
            "ratio": window_var / total_var,
            "window_var": window_var * spread * spread,
            "total_var": total_var * spread * spread,
        }
        stop = metrics["ratio"] < self.threshold
        return diagnosed(stop, Reason.STABILISED if stop else Reason.RUNNING)


def schedule_problems(window: int, probe_every: int, max_steps: int) -> list[str]:
    """Why DVAR with this window could never stop a run of `max_steps` that evaluates every `probe_every` steps."""
    problems = []
    if math.ceil(window / probe_every) < MIN_RECORDS:
        problems.append(
            f"a window of {window} steps holds fewer than {MIN_RECORDS} evaluations when one is made every "
            f"{probe_every} steps: evaluate every {(window - 1) // (MIN_RECORDS - 1)} or more often, "
            f"or widen the window to {(MIN_RECORDS - 1) * probe_every + 1}"
        )
    if window >= max_steps:
        problems.append(
            f"window must be smaller than the cap on steps, got window {window} and cap {max_steps}: "
            "shorten the window or raise the cap"
        )
    return problems


@dataclass(frozen=True)
class FixedSteps:
    """Stop at the record made after `max_steps` updates: the cap that every run has.

    Raises: RefusedInput when `max_steps` is not a whole number of at least 1.
    Source: Section 4.1, the "Baseline" and "Few iters" runs.
    """

    max_steps: int

    def __post_init__(self) -> None:
        if not _whole(self.max_steps) or self.max_steps < 1:
            raise RefusedInput([f"max_steps must be a whole number of updates, 1 or more, got {self.max_steps!r}"])

    def __call__(self, trace: Trace) -> Verdict:
        stop = trace.last_step >= self.max_steps
        metrics = {"max_steps": self.max_steps}
        return Verdict(stop, Reason.CAP if stop else Reason.RUNNING, trace.last_step, repr(self), metrics)


@dataclass(frozen=True)
class AnyOf:
    """Stop as soon as one of `rules` stops.

    The reason is "non-finite" if it is so for one rule, else that of the first rule that stops, else that of the first
    rule.  The metrics and diagnoses of all come with it, so that a run stopped by its cap still tells how far it was
    from converging.

    Raises: RefusedInput when there is no rule.
    """

    rules: tuple[Criterion, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise RefusedInput(["AnyOf needs one rule at least, got none: pass for example (FixedSteps(1000),)"])

    def __call__(self, trace: Trace) -> Verdict:
        verdicts = [rule(trace) for rule in self.rules]
        chosen = min(verdicts, key=lambda verdict: (verdict.reason is not Reason.NON_FINITE, not verdict.stop))
        metrics: dict[str, float] = {}
        for verdict in [*reversed(verdicts), chosen]:
            metrics |= verdict.metrics
        return replace(
            chosen,
            stop=any(verdict.stop for verdict in verdicts),
            metrics=metrics,
            diagnose=lambda: tuple(chain.from_iterable(verdict.diagnoses for verdict in verdicts)),
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
