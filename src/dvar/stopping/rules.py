"""The stopping rules: frozen dataclasses, each called on a trace and returning a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dvar.stopping.combinators import AllOf, AnyOf, AtMost, FixedSteps, NotBefore
from dvar.stopping.curve import Curve
from dvar.stopping.diagnosis import Reason, compute_straight_line_step
from dvar.stopping.octave import Octave
from dvar.stopping.rule import (
    CONDITION_REASONS,
    DEFAULT_STOP_ON,
    RULES,
    Rule,
    RuleEntry,
    check_readiness,
    format_rule,
    is_number,
    is_whole_number,
    judge_below_threshold,
    judge_condition,
    judge_non_finite,
    raise_problems,
    read_curve,
    reason_problems,
    require_positive_level,
    threshold_rule_problems,
    window_problems,
)
from dvar.stopping.trace import LOSS, RELATIVE_LOSS, Trace
from dvar.stopping.verdict import MIN_RECORDS, Verdict

__all__ = [
    "CLIP_S",
    "CONDITION_REASONS",
    "DEFAULT_STOP_ON",
    "MIN_RECORDS",
    "RULES",
    "AllOf",
    "AnyOf",
    "AtMost",
    "Dvar",
    "EmaPercentile",
    "FixedSteps",
    "Hall",
    "NotBefore",
    "Octave",
    "Plateau",
    "Rule",
    "RuleEntry",
    "Trend",
    "schedule_problems",
]

# A rule keeps nothing between calls: all it knows is the trace. So replaying a recorded run gives the verdicts of the
# live run, and resuming a run is reading its trace.


@dataclass(frozen=True, repr=False)
class Dvar:
    """Stop once the variance of L_det over the last ``window`` steps is below ``threshold`` times that over all steps.

    This is Deterministic Variance Evaluation. Called on a trace, it returns a `Verdict` at the newest evaluation. Both
    variances weight a record by the steps since the record before it (the first by 1). The window holds the steps in
    (t - window, t]. Until ``window`` steps have passed since the first record and the window holds 8 records, the
    reason is "warming up" and the ratio is 1. When the condition holds, the curve is diagnosed: the reason is
    "stabilised" if nothing casts doubt on convergence, else the gravest doubt, and ``stop_on`` says which reasons stop.
    A trace in which nothing changed gives "no change", one with a nan or an infinity "non-finite"; neither stops unless
    it is in ``stop_on``, because a rule stops for convergence and not for a fault.

    On an exactly straight line the ratio is (window / t)^2. It falls below the threshold window / sqrt(threshold) steps
    after the first record although nothing converges; that step is the metric ``straight_line_step``.

    Args:
        window: Steps, at least 8; counted in steps at any cadence of evaluation.
        threshold: The share of the total variance below which to stop, inside (0, 1).
        strict_paper: Judge by the published rule: leave out the evaluation of the untouched model and every diagnosis,
            and stop on ratio < threshold alone.
        stop_on: The reasons that stop, out of those whose condition holds, "no change" and "non-finite".
        metric: The metric to read; "eval/first" is L_det with each held sample divided by its first loss.
        ddof: Degrees of freedom subtracted in both variances, 0 or 1.

    Raises:
        RefusedInput: A setting is out of its range, or ``stop_on`` is given with ``strict_paper``. On a call: the trace
            is longer than a window and holds no ``metric``, or the metric is not a single number.

    Source: Section 3.3, Figure 3.
    Deviates: ddof 0 (Figure 3 run in PyTorch has ddof 1); the window is counted in steps at any cadence (the released
    code counts evaluations); the untouched model is evaluated too, and a ratio below the threshold does not stop a
    loss that still falls or whose variance comes from one outlier, unless ``strict_paper``.
    """

    window: int
    threshold: float
    strict_paper: bool = False
    stop_on: tuple[Reason, ...] = DEFAULT_STOP_ON
    metric: str = LOSS
    ddof: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        problems = window_problems(self.window)
        if not is_number(self.threshold) or not 0 < self.threshold < 1:
            problems.append(
                f"threshold must lie between 0 and 1, both excluded, got {self.threshold!r}: "
                "it is the share of the total variance below which to stop, such as 0.15"
            )
        if self.ddof not in (0, 1):
            problems.append(f"ddof must be 0 (NumPy's variance) or 1 (PyTorch's), got {self.ddof!r}")
        if self.strict_paper and self.stop_on != DEFAULT_STOP_ON:
            problems.append(f"strict_paper stops on the ratio alone, got stop_on={self.stop_on!r}: give one of the two")
        raise_problems(problems + reason_problems(self.stop_on))

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        curve = read_curve(self, trace, self.metric, self.window, first_step=1 if self.strict_paper else 0)
        metrics: dict[str, float] = {"ratio": 1.0, "threshold": self.threshold}
        if len(curve):
            metrics["straight_line_step"] = compute_straight_line_step(curve, self.window, self.threshold)
        if verdict := check_readiness(self, curve, trace, metrics):
            return verdict
        spread = curve.spread
        window_var = curve.last(self.window).variance(spread, self.ddof)
        total_var = curve.variance(spread, self.ddof)
        metrics |= {
            "ratio": window_var / total_var,
            "window_var": window_var * spread * spread,
            "total_var": total_var * spread * spread,
        }
        holds = metrics["ratio"] < self.threshold
        if self.strict_paper:
            reason = Reason.STABILISED if holds else Reason.RUNNING
            return Verdict(holds, reason, int(curve.steps[-1]), repr(self), metrics)
        return judge_condition(self, curve, metrics, holds, self.threshold)


RULES.register(
    "dvar",
    RuleEntry(
        "DVAR: stop once the variance of the window is a small share of the whole", ("window", "threshold"), Dvar
    ),
)
RULES.register(
    "paper",
    RuleEntry("DVAR as published: the ratio alone", ("window", "threshold"), partial(Dvar, strict_paper=True)),
)


@dataclass(frozen=True, repr=False)
class EmaPercentile:
    """Stop once a moving average of the loss changes by less than ``threshold`` of itself in ``window`` steps.

    The condition is |EMA(t) - EMA(t - window)| < threshold EMA(t - window); the signed change is the metric ``change``.
    The average begins at the first value. Each further value enters with the weight 1 - (1 - alpha)^g, where g is the
    number of steps since the record before it: alpha itself at cadence 1. Between two records the average is
    interpolated linearly. Warm-up, diagnoses and ``stop_on`` are as in `Dvar`.

    Args:
        window: Steps, at least 8.
        threshold: A positive, finite share.
        alpha: The weight of a new value at cadence 1, inside (0, 1].
        stop_on: As in `Dvar`.
        metric: The metric to read.

    Raises:
        RefusedInput: A setting is out of its range; on a call as `Dvar`, or a value it divides by is not positive.

    Source: Appendix E, "EMA percentile", alpha = 0.1.
    Deviates: the paper gives the measure, but neither a window nor a threshold, nor does it say that the absolute value
    is compared.
    """

    window: int
    threshold: float
    alpha: float = 0.1
    stop_on: tuple[Reason, ...] = DEFAULT_STOP_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        problems = threshold_rule_problems(self)
        if not is_number(self.alpha) or not 0 < self.alpha <= 1:
            problems.append(f"alpha must lie between 0 (excluded) and 1, got {self.alpha!r}: the paper's is 0.1")
        raise_problems(problems)

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        return judge_below_threshold(self, trace, "change", self._measure)

    def _measure(self, curve: Curve) -> dict[str, float]:
        """Return the change of the average over the window, and the average at both ends."""
        start = int(curve.steps[-1]) - self.window
        now, before = self._average(curve, len(curve)), self._average_at(curve, start)
        require_positive_level(self, before, start)
        return {"change": (now - before) / before, "ema": now, "ema_before": before}

    def _average_at(self, curve: Curve, step: int) -> float:
        """Return the average at any step, interpolated between records."""
        after = int(np.searchsorted(curve.steps, step))
        high = self._average(curve, after + 1)
        if curve.steps[after] == step:
            return high
        return float(np.interp(step, curve.steps[after - 1 : after + 1], (self._average(curve, after), high)))

    def _average(self, curve: Curve, count: int) -> float:
        """Return the average after the first ``count`` records: the last value less the decayed changes before it."""
        # A change older than 40 / -log(1 - alpha) steps has a weight below e^-40, which is nothing in float64.
        reach = 40 / -math.log1p(-self.alpha) if self.alpha < 1 else 0
        start = int(np.searchsorted(curve.steps[:count], int(curve.steps[count - 1]) - reach))
        steps, values = curve.steps[start:count], curve.values[start:count]
        weights = np.power(1 - self.alpha, (steps[-1] - steps[:-1]).astype(np.float64))
        return float(values[-1] - np.dot(weights, values[1:] - values[:-1]))


RULES.register(
    "ema",
    RuleEntry(
        "a moving average of the loss no longer changes",
        ("window", "ema_threshold"),
        lambda window, ema_threshold: EmaPercentile(window, ema_threshold),
    ),
)


@dataclass(frozen=True, repr=False)
class Hall:
    """Stop once the loss ranges over less than ``threshold`` of its level in the last ``window`` steps.

    The condition is (max - min) / max < threshold; the share is the metric ``range``. The window holds the steps in
    (t - window, t]; where no record was made at its first step, the loss there is interpolated linearly. Warm-up,
    diagnoses and ``stop_on`` are as in `Dvar`.

    Args:
        window: Steps, at least 8.
        threshold: A positive, finite share.
        level: What the range is divided by, "max" or "mean".
        stop_on: As in `Dvar`.
        metric: The metric to read.

    Raises:
        RefusedInput: A setting is out of its range; on a call as `Dvar`, or the level is not positive.

    Source: Appendix E, "Hall": its formula divides by the maximum, its text by the average; the formula is the default.
    Deviates: the paper gives the measure, but neither a window nor a threshold.
    """

    window: int
    threshold: float
    level: Literal["max", "mean"] = "max"
    stop_on: tuple[Reason, ...] = DEFAULT_STOP_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        problems = threshold_rule_problems(self)
        if self.level not in ("max", "mean"):
            problems.append(f"level must be 'max' (the formula) or 'mean' (the text), got {self.level!r}")
        raise_problems(problems)

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        return judge_below_threshold(self, trace, "range", self._measure)

    def _measure(self, curve: Curve) -> dict[str, float]:
        """Return the range over the window as a share of its level, and its two ends."""
        recent, last = curve.last(self.window), int(curve.steps[-1])
        first_loss = curve.interpolate(last - self.window + 1)
        highest, lowest = max(float(recent.values.max()), first_loss), min(float(recent.values.min()), first_loss)
        level = highest if self.level == "max" else recent.mean
        require_positive_level(self, level, last)
        return {"range": (highest - lowest) / level, "max": highest, "min": lowest}


RULES.register(
    "hall",
    RuleEntry(
        "the loss stays within a small range",
        ("window", "hall_threshold"),
        lambda window, hall_threshold: Hall(window, hall_threshold),
    ),
)


@dataclass(frozen=True, repr=False)
class Trend:
    """Stop once the least-squares line through the last ``window`` steps is flatter than ``threshold`` per step.

    The slope, up or down, in units of the loss per step, is the metric ``slope``. Warm-up, diagnoses and ``stop_on``
    are as in `Dvar`.

    Args:
        window: Steps, at least 8.
        threshold: A positive, finite slope. It is absolute: with ``metric="eval/first"`` it is a share of the first
            loss.
        stop_on: As in `Dvar`.
        metric: The metric to read.

    Raises:
        RefusedInput: A setting is out of its range; on a call as `Dvar`.

    Source: Appendix E, "Trend".
    Deviates: the paper gives the measure, but neither a window nor a threshold.
    """

    window: int
    threshold: float
    stop_on: tuple[Reason, ...] = DEFAULT_STOP_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        raise_problems(threshold_rule_problems(self))

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        return judge_below_threshold(self, trace, "slope", self._measure)

    def _measure(self, curve: Curve) -> dict[str, float]:
        return {"slope": curve.last(self.window).slope()}


RULES.register(
    "trend",
    RuleEntry(
        "the loss has no slope, as a share of its first value",
        ("window", "trend_threshold"),
        lambda window, trend_threshold: Trend(window, trend_threshold, metric=RELATIVE_LOSS),
    ),
)


@dataclass(frozen=True, repr=False)
class Plateau:
    """Stop once ``metric`` has not improved by more than ``min_delta`` for ``patience`` steps.

    The verdict is that at the newest record which holds the metric. The best value is the first one until a value is
    better by more than ``min_delta``; smaller improvements do not move it. The metrics ``best``, ``best_step`` and
    ``waited`` (steps since) are in the verdict.

    Args:
        metric: The metric to read.
        patience: Steps, at least 1.
        min_delta: The improvement that counts, finite and not negative.
        mode: Whether smaller ("min") or larger ("max") values are better.
        stop_on: The reasons that stop, out of "stabilised" and "non-finite".

    Raises:
        RefusedInput: A setting is out of its range. On a call: the trace is longer than ``patience`` and holds no
            ``metric``, or the metric is not a single number.

    Source: Section 4.2, "CLIP-s"; its settings are `CLIP_S`.
    Deviates: patience is counted in steps, so that it means the same at any cadence; the paper counts measurements.
    """

    metric: str
    patience: int
    min_delta: float = 0.0
    mode: Literal["min", "max"] = "min"
    stop_on: tuple[Reason, ...] = (Reason.STABILISED,)

    def __post_init__(self) -> None:
        problems = []
        if not is_whole_number(self.patience) or self.patience < 1:
            problems.append(f"patience must be a whole number of steps, 1 or more, got {self.patience!r}")
        if not is_number(self.min_delta) or not 0 <= self.min_delta < math.inf:
            problems.append(f"min_delta must be a finite number, 0 or more, got {self.min_delta!r}")
        if self.mode not in ("min", "max"):
            problems.append(f"mode must be 'min' or 'max', whichever is better, got {self.mode!r}")
        raise_problems(problems + reason_problems(self.stop_on, (Reason.STABILISED, Reason.NON_FINITE)))

    __repr__ = format_rule

    def __call__(self, trace: Trace) -> Verdict:
        curve = read_curve(self, trace, self.metric, self.patience)
        metrics: dict[str, float] = {"patience": self.patience, "min_delta": self.min_delta}
        if not len(curve):
            metrics |= {"window": self.patience, "seen": 0, "records": 0}
            return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(self), metrics)
        if not math.isfinite(curve.spread):
            return judge_non_finite(self, curve, metrics, self.stop_on)
        sign = 1.0 if self.mode == "max" else -1.0
        best = _find_last_improvement(sign * curve.values, self.min_delta)
        last_step = int(curve.steps[-1])
        metrics |= {
            "best": float(curve.values[best]),
            "best_step": int(curve.steps[best]),
            "waited": last_step - int(curve.steps[best]),
        }
        holds = metrics["waited"] >= self.patience
        reason = Reason.STABILISED if holds else Reason.RUNNING
        return Verdict(holds and reason in self.stop_on, reason, last_step, repr(self), metrics)


RULES.register(
    "plateau",
    RuleEntry(
        "the loss has not improved for some steps",
        ("patience", "min_delta"),
        lambda patience, min_delta: Plateau(LOSS, patience, min_delta),
    ),
)

RULES.register(
    "octave", RuleEntry("the last doubling of the steps brought less than 45 % of what the run has gained", (), Octave)
)


def schedule_problems(window: int, probe_every: int, max_steps: int) -> list[str]:
    """Return why DVAR could never stop a run of ``max_steps`` that is evaluated every ``probe_every`` steps."""
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


def _find_last_improvement(values: NDArray[np.float64], min_delta: float) -> int:
    """Return the index of the last value that beats the best before it by more than ``min_delta``; larger is better."""
    highest = np.maximum.accumulate(values)
    if not min_delta:
        return int(np.searchsorted(highest, highest[-1]))
    best = 0
    while (better := int(np.searchsorted(highest, values[best] + min_delta, side="right"))) < len(values):
        best = better
    return best


def _build_clip_s(failures: int, min_delta: float) -> Plateau:
    every = 50
    # The released code stops when its count of failures exceeds the patience it is given: at one more than that.
    return Plateau("clip_image", patience=every * (failures + 1), min_delta=min_delta, mode="max")


CLIP_S: Mapping[str, Plateau] = MappingProxyType(
    {
        "textual-inversion": _build_clip_s(6, 0.02),
        "dreambooth-lora": _build_clip_s(3, 0.04),
        "custom-diffusion": _build_clip_s(6, 0.02),
    }
)
"""The CLIP-s baseline by method: the CLIP similarity of samples to the instance images, recorded as "clip_image" every
50 steps. Source: Section 4.2; values of the released commands: patience 6, 3 and 6 measurements, of which the code
waits for one more, and improvements above 0.02, 0.04 and 0.02."""
