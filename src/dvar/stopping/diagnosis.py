"""What speaks against a curve as evidence of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from dvar.stopping.curve import Curve

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
