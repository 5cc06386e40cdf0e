"""What a rule says of a trace, why, and what a person should know before believing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from dvar.errors import RefusedInput
from dvar.stopper.record import decode, encode
from dvar.stopper.trace import Curve

# A fall counts from two standard errors of its slope on, if the last quarter of the steps gave this share of it: a
# straight line gives 25 % for ever, an exponential 15 % at 1.25 time constants, with 29 % of its fall to go.
_CLEAR_FALL, _FALLING_SHARE = 2.0, 0.15
# A rise ends a run, so it must be clearer (1 in 700 pieces of noise is), but a tenth of a straight line's pace is news.
_CLEAR_RISE, _RISING_PACE = 3.0, 0.1
_CLEAR_LEVEL = 2.0  # standard deviations of one record
_EARLY, _HALF = 0.05, 0.5


class Reason(StrEnum):
    """Why a verdict is what it is.

    Of a rule: `RUNNING`, `WARMING_UP`, `STABILISED`, `CAP`, `NO_CHANGE` (every value is the same), `NON_FINITE`.  When
    a rule's condition holds and the curve speaks against convergence, the reason is that doubt and not `STABILISED`:
    `OUTLIER_DOMINATED`, `RISING`, `NOT_LEARNING` or `STILL_FALLING`, the first of them in this order.  `Dvar.stop_on`
    says which of these stop.  A trainer also ends a run that is `NON_FINITE` or was `INTERRUPTED`.
    """

    RUNNING = "running"
    WARMING_UP = "warming up"
    STABILISED = "stabilised"
    CAP = "cap reached"
    NOT_LEARNING = "not learning"
    STILL_FALLING = "still falling"
    RISING = "rising"
    OUTLIER_DOMINATED = "outlier-dominated"
    NO_CHANGE = "no change"
    NON_FINITE = "non-finite"
    INTERRUPTED = "interrupted"

    def __repr__(self) -> str:
        return f"Reason.{self.name}"


@dataclass(frozen=True)
class Diagnosis:
    """One thing that speaks against a curve as evidence of convergence; `str()` gives its name and one sentence.

    `metrics` holds the numbers behind it.  Not learning: start, level, jitter, window.  Still falling: late_share,
    slope, slope_error, window and, of DVAR, straight_line_step.  Rising: rise, rise_share, rise_steps.
    Outlier-dominated: outlier_first, outlier_last (steps), outlier_share, ratio_without.
    """

    reason: Reason
    metrics: Mapping[str, float]

    @property
    def sentence(self) -> str:
        """What was found, in one sentence for a person, without its name."""
        return _FOUND[self.reason](self.metrics)

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.sentence}"


@dataclass(frozen=True)
class Verdict:
    """The answer of a rule at one step; `str()` gives the sentence.

    `metrics` holds the numbers behind it, those of a doubt (see `Diagnosis`) included when that is the reason.  Of
    every rule with a window: window, threshold, seen (steps since the first record), records (in the window).  Of DVAR
    also: ratio, window_var, total_var, straight_line_step (see `Dvar`); of the others: change, range or slope; of a
    plateau: best, best_step, waited, patience, min_delta; of a cap: max_steps; of a value that is not finite:
    non_finite_step, non_finite_last, non_finite_records.
    """

    stop: bool
    reason: Reason
    step: int
    rule: str
    metrics: Mapping[str, float]
    diagnose: Callable[[], tuple[Diagnosis, ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def sentence(self) -> str:
        """The verdict in one line, for a person."""
        return f"{'stop' if self.stop else 'go on'} at step {self.step}: {self._because()}"

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """What the rule's condition alone does not show: outlier-dominated, rising, not learning or still falling.

        Worked out when read, from the trace as it was at `step`.
        """
        return self.diagnose()

    def _because(self) -> str:
        metrics, clause = self.metrics, _clause(self.rule, self.metrics)
        if self.reason in _FOUND:
            found = f"{self.reason.value}, {_FOUND[self.reason](metrics)}"
            return f"{clause}, but {found}" if clause else found
        if self.reason is Reason.WARMING_UP and self.step < metrics.get("not_before", 0):
            return f"warming up, no stop before step {metrics['not_before']:.0f}"
        if self.reason is Reason.CAP:
            reached = f"the cap of {metrics['max_steps']:.0f} steps is reached"
            return f"{reached}; {clause}" if clause else reached
        if self.reason is Reason.NON_FINITE:
            return _non_finite(self.rule, metrics)
        if self.reason in (Reason.RUNNING, Reason.STABILISED):
            return clause or (f"the cap is {metrics['max_steps']:.0f} steps" if "max_steps" in metrics else self.reason)
        return _BECAUSE[self.reason](metrics)

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object, its sentences written out."""
        return {
            "stop": self.stop,
            "reason": self.reason.value,
            "step": self.step,
            "rule": self.rule,
            "metrics": encode(dict(self.metrics)),
            "sentence": self.sentence,
            "diagnoses": [
                {"reason": found.reason.value, "sentence": found.sentence, "metrics": encode(dict(found.metrics))}
                for found in self.diagnoses
            ],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` wrote; its diagnoses are those of that moment.

        Raises: RefusedInput when another version wrote it, with other fields or reasons.
        """
        try:
            found = tuple(Diagnosis(Reason(each["reason"]), decode(each["metrics"])) for each in saved["diagnoses"])
            return cls(
                stop=saved["stop"],
                reason=Reason(saved["reason"]),
                step=saved["step"],
                rule=saved["rule"],
                metrics=decode(saved["metrics"]),
                diagnose=lambda: found,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise RefusedInput(
                [f"a saved verdict must be of this version of dvar, and is not ({error}): judge its trace again"]
            ) from error


def diagnose(curve: Curve, window: int, threshold: float | None = None) -> tuple[Diagnosis, ...]:
    """Everything that speaks against `curve` as evidence of convergence, the gravest first.

    `threshold` is that of DVAR, None for a rule that reads no total variance.  `curve` is finite.  The jitter of a
    record is the standard deviation of the differences between neighbours in the window, over sqrt(2).

    - outlier-dominated: one record, or what happened in the first 5 % of the steps, holds over half of the total
      variance, and DVAR would not stop without it.  A loss that starts at its height and falls has half of its variance
      early too, so the first 5 % count as an outlier only when they rise more above the first value than that lies
      above the window's mean.
    - rising: in the latter half of the window the slope lies three standard errors above 0, and the loss rises at more
      than a tenth of the pace of a straight line over the whole run and range.
    - not learning: the window's mean lies no more than two jitters below the first value.
    - still falling: the slope over the window lies two standard errors below 0, and the last quarter of the steps gave
      15 % or more of the fall so far.

    Standard errors are corrected for autocorrelation.  No test depends on the loss's scale or origin.

    Source: none; the paper does not say when DVAR misleads.
    """
    if not curve.spread:
        level = float(curve.values[0])
        return (Diagnosis(Reason.NOT_LEARNING, {"start": level, "level": level, "jitter": 0.0, "window": window}),)
    recent = curve.last(window)
    found = (
        *(_outlier(curve, recent, window, threshold) if threshold is not None else ()),
        *_rise(curve, curve.last(window - window // 2)),
        *_no_learning(curve, recent, window),
        *_fall(curve, recent, window, threshold),
    )
    return tuple(Diagnosis(reason, metrics) for reason, metrics in found)


def _outlier(curve: Curve, recent: Curve, window: int, threshold: float) -> Iterator[tuple[Reason, dict[str, float]]]:
    values, unit = (curve.values - curve.values[0]) / curve.spread, curve.spread
    parts = curve.weights * np.square(values - np.dot(curve.weights, values) / np.sum(curve.weights))
    total, heaviest = float(np.sum(parts)), int(np.argmax(parts))
    if parts[heaviest] > _HALF * total:
        first, end = heaviest, heaviest + 1
    else:
        first, end = 0, int(np.searchsorted(curve.steps, curve.steps[0] + _EARLY * curve.span, side="right"))
        if float(np.sum(parts[:end])) <= _HALF * total:
            return
        # In units of the spread, over the first value: where the window is, and how high the run went.
        if -float(recent.mean - curve.values[0]) / unit >= float(np.max(values[:end])):
            return
    kept = np.r_[0:first, end : len(curve)]
    rest = Curve(curve.steps[kept], curve.values[kept], curve.weights[kept])
    without = 1.0
    if len(rest) > 1 and rest.span >= window:
        whole = rest.variance(unit)
        without = rest.last(window).variance(unit) / whole if whole else 1.0
    if without < threshold:
        return
    yield (
        Reason.OUTLIER_DOMINATED,
        {
            "outlier_first": int(curve.steps[first]),
            "outlier_last": int(curve.steps[end - 1]),
            "outlier_share": float(np.sum(parts[first:end])) / total,
            "ratio_without": without,
        },
    )


def _rise(curve: Curve, late: Curve) -> Iterator[tuple[Reason, dict[str, float]]]:
    if len(late) < 4:
        return
    slope = late.slope()
    rise = slope * late.span
    pace = rise / curve.spread * curve.span / late.span
    if pace > _RISING_PACE and slope > _CLEAR_RISE * late.slope_error(curve.spread):
        share = rise / curve.spread
        yield Reason.RISING, {"rise": rise, "rise_share": share, "rise_steps": late.span}


def _no_learning(curve: Curve, recent: Curve, window: int) -> Iterator[tuple[Reason, dict[str, float]]]:
    jitter = float(np.std(np.diff(recent.values) / curve.spread)) * curve.spread / math.sqrt(2)
    start, level = float(curve.values[0]), recent.mean
    if start - level <= _CLEAR_LEVEL * jitter:
        yield Reason.NOT_LEARNING, {"start": start, "level": level, "jitter": jitter, "window": window}


def _fall(
    curve: Curve, recent: Curve, window: int, threshold: float | None
) -> Iterator[tuple[Reason, dict[str, float]]]:
    late = curve.last(max(1, round(curve.span / 4)))
    if len(late) < 4 or len(recent) < 4:
        return
    slope = recent.slope()
    if slope >= 0:
        return
    # Fitted, since two single records would compare their noise; the first value has no neighbours to fit.
    gained = -late.slope() * curve.span / 4
    far = float(curve.values[0]) - (late.mean - gained / 2)
    error = recent.slope_error(curve.spread)
    if far > 0 and gained >= _FALLING_SHARE * far and slope < -_CLEAR_FALL * error:
        metrics = {"late_share": gained / far, "slope": slope, "slope_error": error, "window": window}
        if threshold is not None:
            metrics["straight_line_step"] = straight_line_step(curve, window, threshold)
        yield Reason.STILL_FALLING, metrics


def straight_line_step(curve: Curve, window: int, threshold: float) -> float:
    """Where DVAR stops an exactly straight line: N / sqrt(alpha) steps after the first record.

    Its ratio is (N / t)^2 there, whatever the slope.  No loss without noise whose fall slows down is stopped later.
    """
    return int(curve.steps[0]) + window / math.sqrt(threshold)


def _percent(ratio: float, threshold: float) -> str:
    return _digits(100 * ratio, 100 * threshold, below=ratio < threshold)


def _digits(value: float, threshold: float, below: bool) -> str:
    """Three digits, or as many more as show whether the value lies below the threshold."""
    texts = [f"{value:.{digits}g}" for digits in range(3, 18)]
    return next((text for text in texts if (abs(float(text)) < threshold) == below), texts[-1])


def _variance_clause(metrics: Mapping[str, float]) -> str:
    ratio, threshold = metrics["ratio"], metrics["threshold"]
    return (
        f"variance of the last {metrics['window']:.0f} steps is {_percent(ratio, threshold)} % of all "
        f"(threshold {100 * threshold:.6g} %)"
    )


def _change_clause(metrics: Mapping[str, float]) -> str:
    change, threshold = metrics["change"], metrics["threshold"]
    sign = "-" if change < 0 else "+"
    return (
        f"the moving average changed by {sign}{_percent(abs(change), threshold)} % over {metrics['window']:.0f} steps "
        f"(threshold {100 * threshold:.6g} %)"
    )


def _range_clause(metrics: Mapping[str, float]) -> str:
    share, threshold = metrics["range"], metrics["threshold"]
    return (
        f"the last {metrics['window']:.0f} steps range over {_percent(share, threshold)} % of their level "
        f"(threshold {100 * threshold:.6g} %)"
    )


def _slope_clause(metrics: Mapping[str, float]) -> str:
    slope, threshold = metrics["slope"], metrics["threshold"]
    told = _digits(slope, threshold, below=abs(slope) < threshold)
    return f"the slope over the last {metrics['window']:.0f} steps is {told} a step (threshold {threshold:.6g})"


def _plateau_clause(metrics: Mapping[str, float]) -> str:
    delta = f" by more than {metrics['min_delta']:.6g}" if metrics["min_delta"] else ""
    return (
        f"no value has beaten {metrics['best']:.6g} of step {metrics['best_step']:.0f}{delta} "
        f"in {metrics['waited']:.0f} steps (patience {metrics['patience']:.0f})"
    )


# By the rule that speaks, and by the metric that only its verdicts hold once there is something to tell.
_CLAUSES: dict[str, tuple[str, Callable[[Mapping[str, float]], str]]] = {
    "Dvar": ("total_var", _variance_clause),
    "EmaPercentile": ("change", _change_clause),
    "Hall": ("range", _range_clause),
    "Trend": ("slope", _slope_clause),
    "Plateau": ("waited", _plateau_clause),
}


def _clause(rule: str, metrics: Mapping[str, float]) -> str:
    name = rule.partition("(")[0]
    known = [_CLAUSES[name]] if name in _CLAUSES else list(_CLAUSES.values())
    return next((told(metrics) for measured, told in known if measured in metrics), "")


def _warming_up(metrics: Mapping[str, float]) -> str:
    return (
        f"warming up, {min(metrics['seen'], metrics['window']):.0f} of {metrics['window']:.0f} steps "
        f"and {metrics['records']:.0f} records in the window"
    )


def _non_finite(rule: str, metrics: Mapping[str, float]) -> str:
    first, last = metrics["non_finite_step"], metrics.get("non_finite_last", metrics["non_finite_step"])
    where = f"at step {first:.0f}" if first == last else f"from step {first:.0f} to step {last:.0f}"
    records = metrics.get("non_finite_records", 1)
    count = f" ({records:.0f} records)" if first != last else ""
    what = "the metric" if "metric=" in rule else "the loss"
    return f"{what} is not finite {where}{count}, so nothing can be said of its variance"


def _not_learning(metrics: Mapping[str, float]) -> str:
    if not metrics["jitter"] and metrics["start"] == metrics["level"]:
        return "the loss never changed; the probe may not be reading the model that is being trained"
    return (
        f"the loss began at {metrics['start']:.6g} and its last {metrics['window']:.0f} steps average "
        f"{metrics['level']:.6g}, which is no fall beyond its jitter of {metrics['jitter']:.2g}"
    )


def _still_falling(metrics: Mapping[str, float]) -> str:
    told = f"the last quarter of the steps gave {100 * metrics['late_share']:.0f} % of the fall so far"
    if "straight_line_step" in metrics:
        told += (
            f" (a straight line gives 25 % for ever, and passes the threshold at step "
            f"{math.floor(metrics['straight_line_step'])} whatever its slope)"
        )
    return told


def _rising(metrics: Mapping[str, float]) -> str:
    return (
        f"over the last {metrics['rise_steps']:.0f} steps the loss rose by {100 * metrics['rise_share']:.2g} % of its "
        "range, so an earlier step may be better"
    )


def _outlier_dominated(metrics: Mapping[str, float]) -> str:
    first, last = metrics["outlier_first"], metrics["outlier_last"]
    where = f"step {first:.0f} holds" if first == last else f"steps {first:.0f} to {last:.0f} hold"
    return (
        f"{where} {100 * metrics['outlier_share']:.0f} % of the total variance, and without "
        f"{'it' if first == last else 'them'} the ratio is {100 * metrics['ratio_without']:.3g} %"
    )


_FOUND: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.OUTLIER_DOMINATED: _outlier_dominated,
    Reason.RISING: _rising,
    Reason.NOT_LEARNING: _not_learning,
    Reason.STILL_FALLING: _still_falling,
}

_BECAUSE: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.WARMING_UP: _warming_up,
    Reason.INTERRUPTED: lambda metrics: "interrupted; the run can go on from its last checkpoint",
    Reason.NO_CHANGE: lambda metrics: "no change, the loss is the same number at every record",
}
