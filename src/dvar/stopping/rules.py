"""When to stop: frozen dataclasses, each called on a trace and giving a verdict.

A rule keeps nothing between calls: all it knows is the trace, so replaying a recorded run gives what the live run gave,
and resuming is reading the trace.

    `Dvar`                             the variance of a window against that of the whole run
    `EmaPercentile`, `Hall`, `Trend`   what the paper tried beside it
    `Plateau`, `CLIP_S`                patience on any metric; the CLIP-s baseline of the paper
    `FixedSteps`                       the cap that every run has (`compositions`)
    `AnyOf`, `AllOf`, `NotBefore`, `AtMost`   rules made of rules (`compositions`)

Rules with a window read L_det unless `metric` names another metric of the trace (`Trace.metric`): "eval/first" is L_det
normalised by the first value at each timestep.  Their windows are in steps.  Until `window` steps have passed since the
first record and the window holds `MIN_RECORDS` of them, the verdict is "warming up".  When such a rule's condition
holds, its curve is examined once (`verdict.diagnose`): the reason is "stabilised" when nothing speaks against it, else
the gravest doubt, and `stop_on` says which of these reasons stop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dvar.stopping.combinators import AllOf, AnyOf, AtMost, FixedSteps, NotBefore
from dvar.stopping.curve import Curve
from dvar.stopping.diagnosis import Reason, straight_line_step
from dvar.stopping.rule import (
    MIN_RECORDS,
    SETTLED,
    STOPS_ON,
    Rule,
    below_threshold,
    below_threshold_problems,
    judged,
    non_finite,
    not_yet,
    read,
    real,
    reason_problems,
    refuse,
    refuse_level,
    whole,
    window_problems,
    written,
)
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict

__all__ = [
    "CLIP_S",
    "MIN_RECORDS",
    "SETTLED",
    "STOPS_ON",
    "AllOf",
    "AnyOf",
    "AtMost",
    "Dvar",
    "EmaPercentile",
    "FixedSteps",
    "Hall",
    "NotBefore",
    "Plateau",
    "Rule",
    "Trend",
    "schedule_problems",
]


@dataclass(frozen=True, repr=False)
class Dvar:
    """Deterministic Variance Evaluation: stop once the variance of L_det over the last `window` steps is less than
    `threshold` times its variance over the whole run.

    Called on a trace, it returns a `Verdict` at the newest evaluation.  Both variances weight a record by the steps
    since the one before it (the first by 1).  The window holds the steps in (t - window, t].  While it warms up the
    ratio is 1.  A trace in which nothing changed gives "no change" and one with a nan or an infinity "non-finite";
    neither stops unless `stop_on` says so, since a rule stops for convergence and not for a fault.

    On an exactly straight line the ratio is (window / t)^2, which is below the threshold from window / sqrt(threshold)
    steps after the first record on although nothing converges; that step is in the metrics as `straight_line_step`.

    `strict_paper` is the published rule: it drops the evaluation of the untouched model and every diagnosis, and stops
    on ratio < threshold alone.  `ddof` is that of both variances, 0 or 1.

    Raises: RefusedInput when `window` is not a whole number of at least 8, `threshold` is not inside (0, 1), `ddof` is
    neither 0 nor 1, or `stop_on` holds what is no reason of this rule or is given with `strict_paper`; on a call,
    RefusedInput when the trace has passed a window of steps without `metric`, or it cannot be read as one number.
    Source: Section 3.3, Figure 3.
    Deviates: ddof 0 (Figure 3 run in PyTorch has ddof 1); the window is counted in steps at any cadence (the released
    code counts evaluations); the untouched model is evaluated too, and a ratio below the threshold does not stop a
    loss that still falls or whose variance is one outlier's, unless `strict_paper`.
    """

    window: int
    threshold: float
    strict_paper: bool = False
    stop_on: tuple[Reason, ...] = STOPS_ON
    metric: str = LOSS
    ddof: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        problems = window_problems(self.window)
        if not real(self.threshold) or not 0 < self.threshold < 1:
            problems.append(
                f"threshold must lie between 0 and 1, both excluded, got {self.threshold!r}: "
                "it is the share of the total variance below which to stop, such as 0.15"
            )
        if self.ddof not in (0, 1):
            problems.append(f"ddof must be 0 (NumPy's variance) or 1 (PyTorch's), got {self.ddof!r}")
        if self.strict_paper and self.stop_on != STOPS_ON:
            problems.append(f"strict_paper stops on the ratio alone, got stop_on={self.stop_on!r}: give one of the two")
        refuse(problems + reason_problems(self.stop_on))

    __repr__ = written

    def __call__(self, trace: Trace) -> Verdict:
        curve = read(self, trace, self.metric, self.window, first_step=1 if self.strict_paper else 0)
        metrics: dict[str, float] = {"ratio": 1.0, "threshold": self.threshold}
        if len(curve):
            metrics["straight_line_step"] = straight_line_step(curve, self.window, self.threshold)
        if early := not_yet(self, curve, trace, metrics):
            return early
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
        return judged(self, curve, metrics, holds, self.threshold)


@dataclass(frozen=True, repr=False)
class EmaPercentile:
    """Stop once the exponential moving average of the loss has changed by less than `threshold` of itself in `window`
    steps: |EMA(t) - EMA(t - n)| < threshold EMA(t - n).

    Called on a trace, it returns a `Verdict`; the signed change is in the metrics as `change`.  The average begins at
    the first value and takes in each further one with the weight 1 - (1 - alpha)^g, g being the steps since the record
    before: alpha itself at cadence 1.  EMA(t - n) lies on the line between the records around t - n.

    Raises: RefusedInput when `window` is not a whole number of at least 8, `threshold` is not positive and finite,
    `alpha` is not inside (0, 1], or for `stop_on` as `Dvar`; on a call as `Dvar`, or when a value it divides by is not
    positive.
    Source: Appendix E, "EMA percentile", alpha = 0.1.
    Deviates: the paper gives the measure and neither n nor a threshold, nor says that it is the absolute value that
    falls below one.
    """

    window: int
    threshold: float
    alpha: float = 0.1
    stop_on: tuple[Reason, ...] = STOPS_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        problems = below_threshold_problems(self)
        if not real(self.alpha) or not 0 < self.alpha <= 1:
            problems.append(f"alpha must lie between 0 (excluded) and 1, got {self.alpha!r}: the paper's is 0.1")
        refuse(problems)

    __repr__ = written

    def __call__(self, trace: Trace) -> Verdict:
        return below_threshold(self, trace, "change", self._measured)

    def _measured(self, curve: Curve) -> dict[str, float]:
        opening = int(curve.steps[-1]) - self.window
        now, before = self._average(curve, len(curve)), self._average_at(curve, opening)
        refuse_level(self, before, opening)
        return {"change": (now - before) / before, "ema": now, "ema_before": before}

    def _average_at(self, curve: Curve, step: int) -> float:
        after = int(np.searchsorted(curve.steps, step))
        high = self._average(curve, after + 1)
        if curve.steps[after] == step:
            return high
        return float(np.interp(step, curve.steps[after - 1 : after + 1], (self._average(curve, after), high)))

    def _average(self, curve: Curve, count: int) -> float:
        """The average after the first `count` records: its last value, less what is left of each change before."""
        # What is older than 40 / -log(1 - alpha) steps weighs less than e^-40: nothing, in float64.
        reach = 40 / -math.log1p(-self.alpha) if self.alpha < 1 else 0
        start = int(np.searchsorted(curve.steps[:count], int(curve.steps[count - 1]) - reach))
        steps, values = curve.steps[start:count], curve.values[start:count]
        left = np.power(1 - self.alpha, (steps[-1] - steps[:-1]).astype(np.float64))
        return float(values[-1] - np.dot(left, values[1:] - values[:-1]))


@dataclass(frozen=True, repr=False)
class Hall:
    """Stop once the loss ranged over less than `threshold` of its level in the last `window` steps:
    (max - min) / max < threshold.

    Called on a trace, it returns a `Verdict`; the share is in the metrics as `range`.  The window holds the steps in
    (t - window, t]; where no record was made at its opening, the line between the records around it counts.  `level`
    is what the range is divided by: "max" or "mean".

    Raises: RefusedInput when `window` is not a whole number of at least 8, `threshold` is not positive and finite,
    `level` is another word, or for `stop_on` as `Dvar`; on a call as `Dvar`, or when the level is not positive.
    Source: Appendix E, "Hall": its formula divides by the maximum, its text by the average; the formula is the default.
    Deviates: the paper gives the measure and neither n nor a threshold.
    """

    window: int
    threshold: float
    level: Literal["max", "mean"] = "max"
    stop_on: tuple[Reason, ...] = STOPS_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        problems = below_threshold_problems(self)
        if self.level not in ("max", "mean"):
            problems.append(f"level must be 'max' (the formula) or 'mean' (the text), got {self.level!r}")
        refuse(problems)

    __repr__ = written

    def __call__(self, trace: Trace) -> Verdict:
        return below_threshold(self, trace, "range", self._measured)

    def _measured(self, curve: Curve) -> dict[str, float]:
        recent, last = curve.last(self.window), int(curve.steps[-1])
        opening = curve.at(last - self.window + 1)
        highest, lowest = max(float(recent.values.max()), opening), min(float(recent.values.min()), opening)
        level = highest if self.level == "max" else recent.mean
        refuse_level(self, level, last)
        return {"range": (highest - lowest) / level, "max": highest, "min": lowest}


@dataclass(frozen=True, repr=False)
class Trend:
    """Stop once the least-squares line through the last `window` steps is flatter than `threshold` a step, up or down.

    Called on a trace, it returns a `Verdict`; the slope, in units of the loss a step, is in the metrics as `slope`.  It
    is found in closed form.  Its threshold is absolute: `metric="eval/first"` makes it a share of the first loss.

    Raises: RefusedInput when `window` is not a whole number of at least 8, `threshold` is not positive and finite, or
    for `stop_on` as `Dvar`; on a call as `Dvar`.
    Source: Appendix E, "Trend".
    Deviates: the paper gives the measure and neither n nor a threshold.
    """

    window: int
    threshold: float
    stop_on: tuple[Reason, ...] = STOPS_ON
    metric: str = LOSS

    def __post_init__(self) -> None:
        refuse(below_threshold_problems(self))

    __repr__ = written

    def __call__(self, trace: Trace) -> Verdict:
        return below_threshold(self, trace, "slope", self._measured)

    def _measured(self, curve: Curve) -> dict[str, float]:
        return {"slope": curve.last(self.window).slope()}


@dataclass(frozen=True, repr=False)
class Plateau:
    """Stop once `metric` has not improved by more than `min_delta` for `patience` steps.

    Called on a trace, it returns a `Verdict` at the newest record that holds the metric.  The best value is the first
    one, until a value beats it by more than `min_delta`, upwards with mode "max", downwards with "min"; best, best_step
    and waited (steps since) are in the metrics.  Values between two improvements do not move the best.

    Raises: RefusedInput when `patience` is not a whole number of at least 1, `min_delta` is negative or not finite,
    `mode` is another word or `stop_on` holds what is no reason of this rule; on a call when `patience` steps have
    passed without the metric in the trace, or when it cannot be read as one number.
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
        if not whole(self.patience) or self.patience < 1:
            problems.append(f"patience must be a whole number of steps, 1 or more, got {self.patience!r}")
        if not real(self.min_delta) or not 0 <= self.min_delta < math.inf:
            problems.append(f"min_delta must be a finite number, 0 or more, got {self.min_delta!r}")
        if self.mode not in ("min", "max"):
            problems.append(f"mode must be 'min' or 'max', what is better, got {self.mode!r}")
        refuse(problems + reason_problems(self.stop_on, (Reason.STABILISED, Reason.NON_FINITE)))

    __repr__ = written

    def __call__(self, trace: Trace) -> Verdict:
        curve = read(self, trace, self.metric, self.patience)
        metrics: dict[str, float] = {"patience": self.patience, "min_delta": self.min_delta}
        if not len(curve):
            metrics |= {"window": self.patience, "seen": 0, "records": 0}
            return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(self), metrics)
        if not math.isfinite(curve.spread):
            return non_finite(self, curve, metrics, self.stop_on)
        sign = 1.0 if self.mode == "max" else -1.0
        best = _last_improvement(sign * curve.values, self.min_delta)
        last = int(curve.steps[-1])
        metrics |= {
            "best": float(curve.values[best]),
            "best_step": int(curve.steps[best]),
            "waited": last - int(curve.steps[best]),
        }
        holds = metrics["waited"] >= self.patience
        reason = Reason.STABILISED if holds else Reason.RUNNING
        return Verdict(holds and reason in self.stop_on, reason, last, repr(self), metrics)


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


def _last_improvement(values: NDArray[np.float64], min_delta: float) -> int:
    """Where the last value lies that beats the best before it by more than `min_delta`; larger is better."""
    highest = np.maximum.accumulate(values)
    if not min_delta:
        return int(np.searchsorted(highest, highest[-1]))
    best = 0
    while (better := int(np.searchsorted(highest, values[best] + min_delta, side="right"))) < len(values):
        best = better
    return best


def _clip_s(failures: int, min_delta: float) -> Plateau:
    every = 50
    # The released code stops when its counter of failures exceeds the patience it is given: at one more than that.
    return Plateau("clip_image", patience=every * (failures + 1), min_delta=min_delta, mode="max")


CLIP_S: Mapping[str, Plateau] = MappingProxyType(
    {"textual-inversion": _clip_s(6, 0.02), "dreambooth-lora": _clip_s(3, 0.04), "custom-diffusion": _clip_s(6, 0.02)}
)
"""The CLIP-s baseline by method: the CLIP similarity of samples to the training pictures, recorded as "clip_image"
every 50 steps.  Source: Section 4.2; values of the released commands: patience 6, 3 and 6 measurements, of which the
code waits for one more, and improvements above 0.02, 0.04 and 0.02."""
