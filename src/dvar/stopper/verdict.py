"""What a rule says of a trace, why, and what a person should know before believing it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from dvar.stopper.trace import Curve, decode, encode

# Half the pace of a straight line: an exponential is that slow once it has made about five sixths of its way.
_FALLING_PACE = 0.5
# A rise is news long before it is fast: a tenth of that pace, if it is more than jitter.
_RISING_PACE = 0.1
# A trend is told from noise at three standard errors of its slope, a level at two standard deviations of a record.
_CLEAR_TREND, _CLEAR_LEVEL = 3.0, 2.0


class Reason(StrEnum):
    """Why a verdict is what it is.  Only `STABILISED` and `CAP` come with a stop."""

    RUNNING = "running"
    WARMING_UP = "warming up"
    STABILISED = "stabilised"
    CAP = "cap reached"
    NO_CHANGE = "no change"
    NON_FINITE = "non-finite"


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
    recent, late = curve.last(window), curve.last(window - window // 2)
    jitter = float(np.std(np.diff(recent.values) / curve.spread)) * curve.spread / math.sqrt(2)
    change = late.slope() * late.span if len(late) > 2 else 0.0
    pace = change / curve.spread * curve.span / max(late.span, 1)
    # The least-squares slope over n evenly spaced records has the standard error jitter * sqrt(12 / n) / span.
    clear = abs(change) > _CLEAR_TREND * jitter * math.sqrt(12 / len(late))
    heaviest, share = _heaviest(curve)

    found = []
    if curve.values[0] - recent.mean <= _CLEAR_LEVEL * jitter:
        found.append(
            f"not learning: the loss began at {curve.values[0]:.6g} and its last {window} steps average "
            f"{recent.mean:.6g}, which is no fall beyond its jitter of {jitter:.2g}"
        )
    if clear and pace < -_FALLING_PACE:
        found.append(
            f"still falling: over the last {late.span} steps at {-pace:.0%} of the pace of a straight line, "
            f"which this rule stops at step {math.floor(straight_line_step)} whatever its slope"
        )
    if clear and pace > _RISING_PACE:
        found.append(
            f"rising: over the last {late.span} steps the loss rose by {change / curve.spread:.1%} of its range; "
            "an earlier step may be better"
        )
    if share > 0.5:
        found.append(
            f"one record holds more than half of the total variance: step {heaviest} holds {share:.0%} of it, "
            "so the ratio says little about the others"
        )
    return tuple(found)


def _heaviest(curve: Curve) -> tuple[int, float]:
    """Step and share of the record that holds most of the total variance."""
    parts = curve.weights * np.square((curve.values - curve.mean) / curve.spread)
    at = int(np.argmax(parts))
    return int(curve.steps[at]), float(parts[at] / np.sum(parts))


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
    return _variance_clause(metrics) if "ratio" in metrics else f"the cap is {metrics['max_steps']:.0f} steps"


def _warming_up(metrics: Mapping[str, float]) -> str:
    return (
        f"warming up, {min(metrics['seen'], metrics['window']):.0f} of {metrics['window']:.0f} steps "
        f"and {metrics['records']:.0f} records in the window"
    )


def _cap(metrics: Mapping[str, float]) -> str:
    clause = f"; {_variance_clause(metrics)}" if "ratio" in metrics else ""
    return f"the cap of {metrics['max_steps']:.0f} steps is reached{clause}"


_BECAUSE: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.RUNNING: _running,
    Reason.STABILISED: _variance_clause,
    Reason.WARMING_UP: _warming_up,
    Reason.CAP: _cap,
    Reason.NO_CHANGE: lambda metrics: "no change, the loss is the same number at every record",
    Reason.NON_FINITE: lambda metrics: (
        f"the loss is not finite at step {metrics['non_finite_step']:.0f}, so nothing can be said of its variance"
    ),
}
