"""What a rule says of a trace, why, and what a person should know before believing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from dvar.stopper.trace import Curve, decode, encode

# Half the pace of a straight line: an exponential is that slow 1.26 time constants after its start, with 28 % to go.
_FALLING_PACE = 0.5
# A tenth of the pace of a straight line: a rise is news long before it is fast.
_RISING_PACE = 0.1
# A trend is told from noise at three standard errors of its slope, a level at two standard deviations of a record.
_CLEAR_TREND, _CLEAR_LEVEL = 3.0, 2.0


class Reason(StrEnum):
    """Why a verdict is what it is.

    A rule stops with `STABILISED` or `CAP` only; a trainer also ends a run that is `NON_FINITE` or was `INTERRUPTED`.
    """

    RUNNING = "running"
    WARMING_UP = "warming up"
    STABILISED = "stabilised"
    CAP = "cap reached"
    NO_CHANGE = "no change"
    NON_FINITE = "non-finite"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Verdict:
    """The answer of a rule at one step; `str()` gives the sentence.

    `metrics` holds the numbers behind it.  Of DVAR: ratio, threshold, window, window_var, total_var, records (in the
    window), seen (steps since the first record), straight_line_step (see `Dvar`); of a cap: max_steps.
    """

    stop: bool
    reason: Reason
    step: int
    rule: str
    metrics: Mapping[str, float]
    diagnose: Callable[[], tuple[str, ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def sentence(self) -> str:
        """The verdict in one line, for a person."""
        return f"{'stop' if self.stop else 'go on'} at step {self.step}: {_BECAUSE[self.reason](self.metrics)}"

    @property
    def diagnoses(self) -> tuple[str, ...]:
        """What the ratio alone does not show: not learning, still falling, rising, or one record that outweighs all.

        Worked out when read, from the trace as it was at `step`.
        """
        return self.diagnose()

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        """The verdict as a JSON object, its sentence and diagnoses written out."""
        return {
            "stop": self.stop,
            "reason": self.reason.value,
            "step": self.step,
            "rule": self.rule,
            "metrics": encode(dict(self.metrics)),
            "sentence": self.sentence,
            "diagnoses": list(self.diagnoses),
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Verdict:
        """The verdict that `to_json` wrote; its diagnoses are those of that moment."""
        diagnoses = tuple(saved["diagnoses"])
        return cls(
            stop=saved["stop"],
            reason=Reason(saved["reason"]),
            step=saved["step"],
            rule=saved["rule"],
            metrics=decode(saved["metrics"]),
            diagnose=lambda: diagnoses,
        )


def diagnose(curve: Curve, window: int, straight_line_step: float) -> tuple[str, ...]:
    """One sentence for each thing wrong with `curve` as evidence of convergence, each opening with its name.

    The jitter of a record is the standard deviation of the differences between neighbours in the window, over sqrt(2).
    The loss is "not learning" when the window's mean lies no more than two jitters below the first value; "still
    falling" when in the latter half of the window it clearly falls, at more than half the pace of a straight line over
    the whole run and range; "rising" likewise, at more than a tenth.  No test depends on the loss's scale or origin.

    Source: none; the paper does not say when DVAR misleads.
    """
    if not curve.spread:
        return ("not learning: the loss never changed; the probe may not be reading the model that is being trained",)
    jitter = float(np.std(np.diff(curve.last(window).values) / curve.spread)) * curve.spread / math.sqrt(2)
    return (
        *_doubts_of_level(curve, window, jitter),
        *_doubts_of_trend(curve, window, jitter, straight_line_step),
        *_doubts_of_weight(curve),
    )


def _doubts_of_level(curve: Curve, window: int, jitter: float) -> Iterator[str]:
    start, level = float(curve.values[0]), curve.last(window).mean
    if start - level <= _CLEAR_LEVEL * jitter:
        yield (
            f"not learning: the loss began at {start:.6g} and its last {window} steps average {level:.6g}, "
            f"which is no fall beyond its jitter of {jitter:.2g}"
        )


def _doubts_of_trend(curve: Curve, window: int, jitter: float, straight_line_step: float) -> Iterator[str]:
    late = curve.last(window - window // 2)
    if len(late) < 3:
        return
    change = late.slope() * late.span
    # The least-squares slope over n evenly spaced records has the standard error jitter * sqrt(12 / n) / span.
    clear = abs(change) > _CLEAR_TREND * jitter * math.sqrt(12 / len(late))
    pace = change / curve.spread * curve.span / late.span
    if clear and pace < -_FALLING_PACE:
        yield (
            f"still falling: over the last {late.span} steps at {-100 * pace:.0f} % of the pace of a straight line, "
            f"which this rule stops at step {math.floor(straight_line_step)} whatever its slope"
        )
    if clear and pace > _RISING_PACE:
        yield (
            f"rising: over the last {late.span} steps the loss rose by {100 * change / curve.spread:.2g} % of its "
            "range, so an earlier step may be better"
        )


def _doubts_of_weight(curve: Curve) -> Iterator[str]:
    parts = curve.weights * np.square((curve.values - curve.mean) / curve.spread)
    heaviest = int(np.argmax(parts))
    share = float(parts[heaviest] / np.sum(parts))
    if share > 0.5:
        yield (
            f"one record holds more than half of the total variance: step {curve.steps[heaviest]} holds "
            f"{100 * share:.0f} % of it, so the ratio says little about the others"
        )


def _percent(ratio: float, threshold: float) -> str:
    """Three digits, or as many more as show on which side of the threshold the ratio lies."""
    texts = [f"{100 * ratio:.{digits}g}" for digits in range(3, 18)]
    honest = (text for text in texts if (float(text) < 100 * threshold) == (ratio < threshold))
    return next(honest, texts[-1])


def _variance_clause(metrics: Mapping[str, float]) -> str:
    ratio, threshold = metrics["ratio"], metrics["threshold"]
    return (
        f"variance of the last {metrics['window']:.0f} steps is {_percent(ratio, threshold)} % of all "
        f"(threshold {100 * threshold:.6g} %)"
    )


def _running(metrics: Mapping[str, float]) -> str:
    return _variance_clause(metrics) if "total_var" in metrics else f"the cap is {metrics['max_steps']:.0f} steps"


def _warming_up(metrics: Mapping[str, float]) -> str:
    return (
        f"warming up, {min(metrics['seen'], metrics['window']):.0f} of {metrics['window']:.0f} steps "
        f"and {metrics['records']:.0f} records in the window"
    )


def _cap(metrics: Mapping[str, float]) -> str:
    clause = f"; {_variance_clause(metrics)}" if "total_var" in metrics else ""
    return f"the cap of {metrics['max_steps']:.0f} steps is reached{clause}"


_BECAUSE: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.RUNNING: _running,
    Reason.STABILISED: _variance_clause,
    Reason.WARMING_UP: _warming_up,
    Reason.CAP: _cap,
    Reason.INTERRUPTED: lambda metrics: "interrupted; the run can go on from its last checkpoint",
    Reason.NO_CHANGE: lambda metrics: "no change, the loss is the same number at every record",
    Reason.NON_FINITE: lambda metrics: (
        f"the loss is not finite at step {metrics['non_finite_step']:.0f}, so nothing can be said of its variance"
    ),
}
