"""What a rule says of a trace, why, and what a person should know before believing it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.diagnosis import _FOUND, Diagnosis, Reason
from dvar.stopping.trace_format import decode, encode


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


_BECAUSE: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.WARMING_UP: _warming_up,
    Reason.INTERRUPTED: lambda metrics: "interrupted; the run can go on from its last checkpoint",
    Reason.NO_CHANGE: lambda metrics: "no change, the loss is the same number at every record",
}
