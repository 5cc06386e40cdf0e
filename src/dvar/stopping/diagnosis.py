"""Doubts about a curve as evidence of convergence."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

import numpy as np

from dvar.stopping.curve import Curve

# A fall counts from two standard errors of its slope on, if the last quarter of the steps contributed this share of it:
# a straight line gives 25 % at any length, an exponential 15 % at 1.25 time constants, with 29 % of its fall to come.
_CLEAR_FALL, _FALLING_SHARE = 2.0, 0.15

# A rise ends a run, so it must be clearer (noise passes 1 time in 700); a tenth of a straight line's pace is enough.
_CLEAR_RISE, _RISING_PACE = 3.0, 0.1

_CLEAR_LEVEL = 2.0  # standard deviations of one record

_EARLY, _HALF = 0.05, 0.5


class Reason(str, Enum):
    """The reason of a verdict.

    A rule gives `RUNNING`, `WARMING_UP`, `STABILISED`, `CAP`, `NO_CHANGE` (every value is the same) or `NON_FINITE`.
    When its condition holds although something casts doubt on convergence, the reason is that doubt instead of
    `STABILISED`: `OUTLIER_DOMINATED`, `RISING`, `NOT_LEARNING` or `STILL_FALLING`, the first of them in this order.
    ``Dvar.stop_on`` says which of these stop. A trainer also ends a run that is `NON_FINITE` or was `INTERRUPTED`.
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

    # Python 3.10 has no StrEnum: these two make a reason print as its text.

    def __str__(self) -> str:
        return str.__str__(self)

    def __format__(self, format_spec: str) -> str:
        return str.__format__(self, format_spec)

    def __repr__(self) -> str:
        return f"Reason.{self.name}"


@dataclass(frozen=True)
class Diagnosis:
    """A doubt: one reason to think that the run has not converged. `str()` gives its name and one sentence.

    Args:
        reason: "not learning", "still falling", "rising" or "outlier-dominated".
        metrics: The numbers behind it. Not learning: start, level, jitter, window. Still falling: late_share, slope,
            slope_error, window and, with DVAR, straight_line_step. Rising: rise, rise_share, rise_steps.
            Outlier-dominated: outlier_first, outlier_last (steps), outlier_share, ratio_without.
    """

    reason: Reason
    metrics: Mapping[str, float]

    @property
    def sentence(self) -> str:
        """The doubt in one sentence, without its name."""
        return DOUBT_SENTENCES[self.reason](self.metrics)

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.sentence}"


def diagnose(curve: Curve, window: int, threshold: float | None = None) -> tuple[Diagnosis, ...]:
    """Return all doubts about ``curve`` as evidence of convergence, the gravest first.

    The jitter is the standard deviation of the differences between neighbours in the window, over sqrt(2).

    - outlier-dominated: one record, or the first 5 % of the steps, holds over half of the total variance, and DVAR
      would not stop without it. A loss that starts at its maximum and falls also has half of its variance early, so
      the first 5 % count as an outlier only when they rise more above the first value than that lies above the
      window's mean.
    - rising: in the latter half of the window the slope lies three standard errors above 0, and the loss rises at more
      than a tenth of the pace of a straight line over the whole run and range.
    - not learning: the window's mean lies no more than two jitters below the first value.
    - still falling: the slope over the window lies two standard errors below 0, and the last quarter of the steps
      contributed 15 % or more of the fall so far.

    Standard errors are corrected for autocorrelation. No test depends on the scale or the origin of the loss.

    Args:
        curve: Finite values.
        window: Steps.
        threshold: That of DVAR; None for a rule that uses no total variance.

    Source: none; the paper does not say when DVAR misleads.
    """
    if not curve.spread:
        level = float(curve.values[0])
        return (Diagnosis(Reason.NOT_LEARNING, {"start": level, "level": level, "jitter": 0.0, "window": window}),)
    outliers = _find_outlier(curve, curve.last(window), window, threshold) if threshold is not None else ()
    others = curve.derive(("doubts", window), lambda: _find_doubts(curve, window))
    diagnoses = [Diagnosis(reason, metrics) for reason, metrics in (*outliers, *others)]
    if threshold is not None and diagnoses and diagnoses[-1].reason is Reason.STILL_FALLING:
        step = compute_straight_line_step(curve, window, threshold)
        diagnoses[-1] = Diagnosis(Reason.STILL_FALLING, {**diagnoses[-1].metrics, "straight_line_step": step})
    return tuple(diagnoses)


def compute_straight_line_step(curve: Curve, window: int, threshold: float) -> float:
    """Return the step at which DVAR stops an exactly straight line: window / sqrt(threshold) after the first record.

    On such a line the ratio is (window / t)^2, whatever the slope. A noiseless loss whose fall slows down never stops
    later.
    """
    return int(curve.steps[0]) + window / math.sqrt(threshold)


def _find_doubts(curve: Curve, window: int) -> tuple[tuple[Reason, dict[str, float]], ...]:
    """Return the doubts that depend on no threshold."""
    recent = curve.last(window)
    return (
        *_find_rise(curve, curve.last(window - window // 2)),
        *_find_no_learning(curve, recent, window),
        *_find_fall(curve, recent, window),
    )


def _find_outlier(
    curve: Curve, recent: Curve, window: int, threshold: float
) -> Iterator[tuple[Reason, dict[str, float]]]:
    """Yield the doubt that one record, or the first 5 % of the steps, holds half of the total variance."""
    heavy = curve.derive("heavy", lambda: _find_heavy(curve))
    if heavy is None:
        return
    unit, first, end, rest = curve.spread, heavy.first, heavy.end, heavy.rest
    # Above the first value, in units of the spread: the first value over the window's mean, and the early maximum.
    if heavy.early_maximum is not None and -float(recent.mean - curve.values[0]) / unit >= heavy.early_maximum:
        return
    ratio = 1.0
    if len(rest) > 1 and rest.span >= window:
        total_var = rest.variance(unit)
        ratio = rest.last(window).variance(unit) / total_var if total_var else 1.0
    if ratio < threshold:
        return
    yield (
        Reason.OUTLIER_DOMINATED,
        {
            "outlier_first": int(curve.steps[first]),
            "outlier_last": int(curve.steps[end - 1]),
            "outlier_share": heavy.share,
            "ratio_without": ratio,
        },
    )


@dataclass(frozen=True)
class _Heavy:
    """The records that hold over half of the total variance: their indices, their share, and the curve without them.

    ``early_maximum`` is that of the first 5 % of the steps above the first value, where it is these.
    """

    first: int
    end: int
    share: float
    rest: Curve
    early_maximum: float | None


def _find_heavy(curve: Curve) -> _Heavy | None:
    values, early_maximum = (curve.values - curve.values[0]) / curve.spread, None
    parts = curve.weights * np.square(values - np.dot(curve.weights, values) / np.sum(curve.weights))
    total, heaviest = float(np.sum(parts)), int(np.argmax(parts))
    if parts[heaviest] > _HALF * total:
        first, end = heaviest, heaviest + 1
    else:
        first, end = 0, int(np.searchsorted(curve.steps, curve.steps[0] + _EARLY * curve.span, side="right"))
        if float(np.sum(parts[:end])) <= _HALF * total:
            return None
        early_maximum = float(np.max(values[:end]))
    others = np.r_[0:first, end : len(curve)]
    rest = Curve(curve.steps[others], curve.values[others], curve.weights[others])
    return _Heavy(first, end, float(np.sum(parts[first:end])) / total, rest, early_maximum)


def _find_rise(curve: Curve, late: Curve) -> Iterator[tuple[Reason, dict[str, float]]]:
    """Yield the doubt that the loss rises over the latter half of the window."""
    if len(late) < 4:
        return
    slope = late.slope()
    rise = slope * late.span
    pace = rise / curve.spread * curve.span / late.span
    if pace > _RISING_PACE and slope > _CLEAR_RISE * late.slope_error(curve.spread):
        share = rise / curve.spread
        yield Reason.RISING, {"rise": rise, "rise_share": share, "rise_steps": late.span}


def _find_no_learning(curve: Curve, recent: Curve, window: int) -> Iterator[tuple[Reason, dict[str, float]]]:
    """Yield the doubt that the loss is not clearly lower than it began."""
    jitter = float(np.std(np.diff(recent.values) / curve.spread)) * curve.spread / math.sqrt(2)
    start, level = float(curve.values[0]), recent.mean
    if start - level <= _CLEAR_LEVEL * jitter:
        yield Reason.NOT_LEARNING, {"start": start, "level": level, "jitter": jitter, "window": window}


def _find_fall(curve: Curve, recent: Curve, window: int) -> Iterator[tuple[Reason, dict[str, float]]]:
    """Yield the doubt that the loss still falls."""
    late = curve.last(max(1, round(curve.span / 4)))
    if len(late) < 4 or len(recent) < 4:
        return
    slope = recent.slope()
    if slope >= 0:
        return
    # Fitted, because the difference of two records is mostly their noise; the first value has no neighbours to fit.
    late_fall = -late.slope() * curve.span / 4
    fall = float(curve.values[0]) - (late.mean - late_fall / 2)
    error = recent.slope_error(curve.spread)
    if fall > 0 and late_fall >= _FALLING_SHARE * fall and slope < -_CLEAR_FALL * error:
        yield (
            Reason.STILL_FALLING,
            {"late_share": late_fall / fall, "slope": slope, "slope_error": error, "window": window},
        )


# --- sentences ------------------------------------------------------------------------------------------------------


def _format_not_learning(metrics: Mapping[str, float]) -> str:
    if not metrics["jitter"] and metrics["start"] == metrics["level"]:
        return "the loss never changed; the probe may not measure the model that is being trained"
    return (
        f"the loss began at {metrics['start']:.6g} and averages {metrics['level']:.6g} over the last "
        f"{metrics['window']:.0f} steps, which is no clear fall beside its jitter of {metrics['jitter']:.2g}"
    )


def _format_still_falling(metrics: Mapping[str, float]) -> str:
    sentence = f"the last quarter of the steps contributed {100 * metrics['late_share']:.0f} % of the fall so far"
    if "straight_line_step" in metrics:
        sentence += (
            " (on a straight line it is always 25 %, and the ratio passes the threshold at step "
            f"{math.floor(metrics['straight_line_step'])} whatever the slope)"
        )
    return sentence


def _format_rising(metrics: Mapping[str, float]) -> str:
    return (
        f"over the last {metrics['rise_steps']:.0f} steps the loss rose by {100 * metrics['rise_share']:.2g} % of its "
        "range, so an earlier step may be better"
    )


def _format_outlier_dominated(metrics: Mapping[str, float]) -> str:
    first, last = metrics["outlier_first"], metrics["outlier_last"]
    subject = f"step {first:.0f} accounts" if first == last else f"steps {first:.0f} to {last:.0f} account"
    return (
        f"{subject} for {100 * metrics['outlier_share']:.0f} % of the total variance; without "
        f"{'it' if first == last else 'them'} the ratio is {100 * metrics['ratio_without']:.3g} %"
    )


DOUBT_SENTENCES: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.OUTLIER_DOMINATED: _format_outlier_dominated,
    Reason.RISING: _format_rising,
    Reason.NOT_LEARNING: _format_not_learning,
    Reason.STILL_FALLING: _format_still_falling,
}
"""The sentence of each doubt, from the metrics of its `Diagnosis`."""
