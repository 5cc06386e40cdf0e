"""The verdict of a rule: whether to stop, why, and the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dvar.errors import RefusedInput
from dvar.schema import find_mismatch
from dvar.stopping.diagnosis import DOUBT_SENTENCES, Diagnosis, Reason
from dvar.stopping.trace_format import decode_value, encode_value

MIN_RECORDS = 8
"""A window that holds fewer records is not judged."""

_SCHEMA = {
    "stop": bool,
    "reason": str,
    "step": int,
    "rule": str,
    "metrics": {str: (float, str)},
    "diagnoses": [{"reason": str, "metrics": {str: (float, str)}}],
}


@dataclass(frozen=True)
class Verdict:
    """The answer of a rule at one step. `str()` gives it as a sentence.

    Args:
        stop: Whether to stop.
        reason: Why.
        step: The step of the record that was judged.
        rule: The rule as Python source.
        metrics: The numbers behind the verdict, those of a doubt included when that is the reason (see `Diagnosis`).
            Every rule with a window: window, threshold, seen (steps since the first record), records (in the window).
            DVAR also: ratio, window_var, total_var, straight_line_step (see `Dvar`); the other rules: change, range or
            slope; a plateau: best, best_step, waited, patience, min_delta; octave: gain, octave_gain, noise, doubt,
            disagreement (see `Octave`) and its settings; a cap: max_steps; a value that is not
            finite: non_finite_step, non_finite_last, non_finite_records. "ratio" is what DVAR and octave compare with
            their "threshold"; octave has none before anything was gained.
        diagnose: Computes `diagnoses`.
    """

    stop: bool
    reason: Reason
    step: int
    rule: str
    metrics: Mapping[str, float]
    diagnose: Callable[[], tuple[Diagnosis, ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def sentence(self) -> str:
        """The verdict in one line, for people."""
        return f"{'stop' if self.stop else 'go on'} at step {self.step}: {self._explain()}"

    @property
    def diagnoses(self) -> tuple[Diagnosis, ...]:
        """All doubts about convergence, the gravest first; the rule's condition may hold all the same.

        They are computed when read, from the trace as it was at ``step``.
        """
        return self.diagnose()

    def _explain(self) -> str:
        """Return the sentence without answer and step."""
        metrics, clause = self.metrics, _format_measurement(self.rule, self.metrics)
        if self.reason in DOUBT_SENTENCES:
            doubt = f"{self.reason.value}: {DOUBT_SENTENCES[self.reason](metrics)}"
            return f"{clause}, but {doubt}" if clause else doubt
        if self.reason is Reason.WARMING_UP and self.step < metrics.get("not_before", 0):
            return f"warming up, no stop before step {metrics['not_before']:.0f}"
        if self.reason is Reason.CAP:
            cap = f"the cap of {metrics['max_steps']:.0f} steps is reached"
            return f"{cap}; {clause}" if clause else cap
        if self.reason is Reason.NON_FINITE:
            return _format_non_finite(self.rule, metrics)
        if self.reason in (Reason.RUNNING, Reason.STABILISED):
            return clause or (f"the cap is {metrics['max_steps']:.0f} steps" if "max_steps" in metrics else self.reason)
        return _SENTENCES[self.reason](metrics)

    def __str__(self) -> str:
        return self.sentence

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as a JSON object, with its sentences."""
        return {
            "stop": self.stop,
            "reason": self.reason.value,
            "step": self.step,
            "rule": self.rule,
            "metrics": encode_value(dict(self.metrics)),
            "sentence": self.sentence,
            "diagnoses": [
                {
                    "reason": diagnosis.reason.value,
                    "sentence": diagnosis.sentence,
                    "metrics": encode_value(dict(diagnosis.metrics)),
                }
                for diagnosis in self.diagnoses
            ],
        }

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Verdict:
        """Return the verdict that `to_json` saved, with the diagnoses of that moment.

        Raises:
            RefusedInput: Another version saved it, with other fields or reasons.
        """
        try:
            if mismatch := find_mismatch(saved, _SCHEMA):
                raise ValueError(mismatch)
            diagnoses = tuple(
                Diagnosis(Reason(diagnosis["reason"]), decode_value(diagnosis["metrics"]))
                for diagnosis in saved["diagnoses"]
            )
            verdict = cls(
                stop=saved["stop"],
                reason=Reason(saved["reason"]),
                step=saved["step"],
                rule=saved["rule"],
                metrics=decode_value(saved["metrics"]),
                diagnose=lambda: diagnoses,
            )
            # What a sentence needs differs by reason: these are all.
            f"{verdict} {''.join(diagnosis.sentence for diagnosis in diagnoses)}"
            return verdict
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise RefusedInput(
                [f"a saved verdict must be of this version of dvar, and is not ({error}): judge its trace again"]
            ) from error


# --- what a rule measured -------------------------------------------------------------------------------------------


def _format_percent(ratio: float, threshold: float) -> str:
    return _format_beside(100 * ratio, 100 * threshold, below=ratio < threshold)


def _format_beside(value: float, threshold: float, below: bool) -> str:
    """Return the value to three digits, or to as many as it takes to show on which side of the threshold it is."""
    texts = [f"{value:.{digits}g}" for digits in range(3, 18)]
    return next((text for text in texts if (abs(float(text)) < threshold) == below), texts[-1])


def _format_ratio(metrics: Mapping[str, float]) -> str:
    ratio, threshold = metrics["ratio"], metrics["threshold"]
    return (
        f"the variance of the last {metrics['window']:.0f} steps is {_format_percent(ratio, threshold)} % of the total "
        f"(threshold {100 * threshold:.6g} %)"
    )


def _format_change(metrics: Mapping[str, float]) -> str:
    change, threshold = metrics["change"], metrics["threshold"]
    sign = "-" if change < 0 else "+"
    return (
        f"the moving average changed by {sign}{_format_percent(abs(change), threshold)} % over "
        f"{metrics['window']:.0f} steps (threshold {100 * threshold:.6g} %)"
    )


def _format_range(metrics: Mapping[str, float]) -> str:
    share, threshold = metrics["range"], metrics["threshold"]
    return (
        f"the values of the last {metrics['window']:.0f} steps range over {_format_percent(share, threshold)} % of "
        f"their level (threshold {100 * threshold:.6g} %)"
    )


def _format_slope(metrics: Mapping[str, float]) -> str:
    slope, threshold = metrics["slope"], metrics["threshold"]
    text = _format_beside(slope, threshold, below=abs(slope) < threshold)
    return f"the slope over the last {metrics['window']:.0f} steps is {text} per step (threshold {threshold:.6g})"


def _format_plateau(metrics: Mapping[str, float]) -> str:
    delta = f" by more than {metrics['min_delta']:.6g}" if metrics["min_delta"] else ""
    return (
        f"no improvement on {metrics['best']:.6g} at step {metrics['best_step']:.0f}{delta} "
        f"for {metrics['waited']:.0f} steps (patience {metrics['patience']:.0f})"
    )


def _format_octave(metrics: Mapping[str, float]) -> str:
    gain, noise = metrics["gain"], metrics["noise"]
    if not gain > metrics["noise_multiple"] * noise:
        multiple = f"{metrics['noise_multiple']:.6g} times the noise of {100 * noise:.2g} %"
        return f"the samples' losses have fallen by {100 * gain:.2g} %, no more than {multiple}"
    share = f"{100 * metrics['octave_gain'] / gain:.3g} %" if metrics["octave_gain"] > 0 else "none"
    brought = f"the last doubling of the steps brought {share} of the gain (limit {100 * metrics['share']:.6g} %)"
    needed = metrics["agreement"] * metrics["disagreement"]
    if 0 < metrics["doubt"] <= needed:
        return f"{brought}, but the held samples do not agree on it yet"
    return brought


# By the class of the rule, and by a metric that only its own verdicts hold, once there is something to measure.
_MEASUREMENTS: dict[str, tuple[str, Callable[[Mapping[str, float]], str]]] = {
    "Dvar": ("total_var", _format_ratio),
    "EmaPercentile": ("change", _format_change),
    "Hall": ("range", _format_range),
    "Trend": ("slope", _format_slope),
    "Plateau": ("waited", _format_plateau),
    "Octave": ("octave_gain", _format_octave),
}


def _format_measurement(rule: str, metrics: Mapping[str, float]) -> str:
    """Return what the rule measured beside its threshold; an empty text where it measured nothing."""
    name = rule.partition("(")[0]
    formats = [_MEASUREMENTS[name]] if name in _MEASUREMENTS else list(_MEASUREMENTS.values())
    return next((format_metrics(metrics) for metric, format_metrics in formats if metric in metrics), "")


# --- other reasons --------------------------------------------------------------------------------------------------


def _format_warming_up(metrics: Mapping[str, float]) -> str:
    sentence = f"warming up, {min(metrics['seen'], metrics['window']):.0f} of {metrics['window']:.0f} steps"
    needed = metrics.get("records_needed", MIN_RECORDS)
    if metrics["records"] < needed:
        sentence += f", {metrics['records']:.0f} of the {needed:.0f} records needed"
    return sentence


def _format_non_finite(rule: str, metrics: Mapping[str, float]) -> str:
    first, last = metrics["non_finite_step"], metrics.get("non_finite_last", metrics["non_finite_step"])
    where = f"at step {first:.0f}" if first == last else f"from step {first:.0f} to step {last:.0f}"
    records = metrics.get("non_finite_records", 1)
    count = f" ({records:.0f} records)" if first != last else ""
    subject = "the metric" if "metric=" in rule else "the loss"
    return f"{subject} is not finite {where}{count}, so its variance is undefined"


_SENTENCES: dict[Reason, Callable[[Mapping[str, float]], str]] = {
    Reason.WARMING_UP: _format_warming_up,
    Reason.INTERRUPTED: lambda metrics: "interrupted; the run can be resumed from its last checkpoint",
    Reason.NO_CHANGE: lambda metrics: "no change, the loss is the same at every record",
}
