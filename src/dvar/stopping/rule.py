"""What rules share: their registry, checks of settings, reading a metric, and turning a condition into a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from dvar.errors import RefusedInput, TraceError
from dvar.registry import Registry
from dvar.stopping.curve import Curve
from dvar.stopping.diagnosis import Reason, diagnose
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import MIN_RECORDS, Verdict

CONDITION_REASONS = (
    Reason.STABILISED,
    Reason.NOT_LEARNING,
    Reason.STILL_FALLING,
    Reason.RISING,
    Reason.OUTLIER_DOMINATED,
)
"""The reasons of a verdict when a rule's condition holds. The rule of the paper stops on all of them."""
DEFAULT_STOP_ON = (Reason.STABILISED, Reason.NOT_LEARNING, Reason.RISING)
"""The default of `stop_on`. A loss that still falls needs more steps, and one outlier can feign a fall; but more steps
help neither a loss that rises nor one that settled without improving."""


class Rule(Protocol):
    """Anything that returns a verdict when it is called on a trace."""

    def __call__(self, trace: Trace) -> Verdict:
        """Return the verdict at the newest record of ``trace``."""
        ...


class WindowRule(Protocol):
    """A rule that reads the last ``window`` steps of one metric."""

    @property
    def window(self) -> int: ...
    @property
    def stop_on(self) -> tuple[Reason, ...]: ...
    @property
    def metric(self) -> str: ...


class ThresholdRule(WindowRule, Protocol):
    """A rule of Appendix E: a window, and a threshold for one number that is measured over it."""

    @property
    def threshold(self) -> float: ...


@dataclass(frozen=True)
class RuleEntry:
    """A rule that a user chooses by name, as `dvar replay --rule NAME` does.

    Args:
        title: What the rule does, in one line.
        settings: Names of the settings that ``build`` takes. Those of `dvar replay` are window, threshold,
            ema_threshold, hall_threshold, trend_threshold, patience and min_delta.
        build: Builds the rule from these settings, passed by keyword.
    """

    title: str
    settings: tuple[str, ...]
    build: Callable[..., Rule]


RULES: Registry[RuleEntry] = Registry("rule", "dvar.rules")
"""The rules that a user can choose by name. Other packages add theirs under the entry point group "dvar.rules"."""

RULE_DEFAULTS: Mapping[str, float] = MappingProxyType(
    {"ema_threshold": 1e-3, "hall_threshold": 1e-2, "trend_threshold": 1e-6, "min_delta": 0.0}
)
"""The settings of rules for which Appendix E gives no value, by name: ours, for a loss that falls by a few per cent."""


def build_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return the rule that is registered as ``name``, built from those of ``settings`` that it takes.

    Raises:
        RefusedInput: There is no such rule, ``settings`` lacks one that it takes, or the rule refuses one.
    """
    entry = RULES.find(name)
    missing = [setting for setting in entry.settings if setting not in settings]
    if missing:
        raise RefusedInput(
            f"the rule {name!r} takes a setting {setting!r}, got only {', '.join(settings)}: give it a default"
            for setting in missing
        )
    return entry.build(**{setting: settings[setting] for setting in entry.settings})


# --- reading the metric ---------------------------------------------------------------------------------------------


def read_curve(rule: object, trace: Trace, metric: str, patience: int, first_step: int = 0) -> Curve:
    """Return the curve of ``metric`` that ``rule`` judges, from ``first_step`` on.

    A metric may begin late, but no later than ``patience`` steps, when the rule would be ready to judge it.

    Raises:
        RefusedInput: ``trace`` is no trace, or the metric is missing or not a single number.
    """
    name = type(rule).__name__
    if not isinstance(trace, Trace):
        raise RefusedInput(
            f"{name} is called on a Trace, got {type(trace).__name__}: "
            "record the losses first, trace.record(step, losses)"
        )
    try:
        curve = Curve.from_trace(trace, metric, first_step)
    except TraceError as error:
        raise RefusedInput([f"{name} cannot use its metric: {error}"]) from error
    start = max(trace.first_step, first_step, trace.judged_from)
    if not len(curve) and trace.last_step - start >= patience:
        recorded = ", ".join(trace.metric_names) or "no metric at all"
        raise RefusedInput(
            [
                f"{name} reads {metric!r}, which no record up to step {trace.last_step} holds: "
                f"record it, or name one of those recorded ({recorded})"
            ]
        )
    return curve


# --- verdicts -------------------------------------------------------------------------------------------------------


def check_readiness(rule: WindowRule, curve: Curve, trace: Trace, metrics: dict[str, float]) -> Verdict | None:
    """Return the verdict where there is nothing to judge yet, else None; ``metrics`` gains what has been seen."""
    metrics |= {"window": rule.window, "seen": 0, "records": 0}
    if not len(curve):
        return Verdict(False, Reason.WARMING_UP, trace.last_step, repr(rule), metrics)
    step = int(curve.steps[-1])
    metrics |= {
        "seen": curve.span,
        "records": len(curve) - int(curve.steps.searchsorted(step - rule.window, side="right")),
    }
    spread = curve.spread
    if not math.isfinite(spread):
        return judge_non_finite(rule, curve, metrics, rule.stop_on)
    if curve.span < rule.window or metrics["records"] < MIN_RECORDS:
        return Verdict(False, Reason.WARMING_UP, step, repr(rule), metrics)
    if not spread:
        diagnoses = partial(diagnose, curve, rule.window)
        return Verdict(Reason.NO_CHANGE in rule.stop_on, Reason.NO_CHANGE, step, repr(rule), metrics, diagnoses)
    return None


def judge_non_finite(rule: object, curve: Curve, metrics: dict[str, float], stop_on: tuple[Reason, ...]) -> Verdict:
    """Return the verdict on a curve with non-finite values; ``metrics`` gains the steps between which they are."""
    non_finite = ~np.isfinite(curve.values)
    # Finite values can be too far apart for float64: their spread is infinite. Then the furthest are named.
    if not non_finite.any():
        non_finite = np.abs(curve.values) >= np.abs(curve.values).max() / 2
    steps = curve.steps[non_finite]
    metrics |= {
        "non_finite_step": int(steps[0]),
        "non_finite_last": int(steps[-1]),
        "non_finite_records": len(steps),
    }
    stop = Reason.NON_FINITE in stop_on
    return Verdict(stop, Reason.NON_FINITE, int(curve.steps[-1]), repr(rule), metrics)


def judge_condition(
    rule: WindowRule, curve: Curve, metrics: dict[str, float], holds: bool, threshold: float | None = None
) -> Verdict:
    """Return the verdict of a rule whose condition ``holds`` or not.

    The curve is diagnosed at once if the condition holds, else only when the diagnoses are read.
    """
    verdict = partial(Verdict, step=int(curve.steps[-1]), rule=repr(rule))
    if not holds:
        later = partial(diagnose, curve, rule.window, threshold)
        return verdict(False, Reason.RUNNING, metrics=metrics, diagnose=later)
    diagnoses = diagnose(curve, rule.window, threshold)
    reason = diagnoses[0].reason if diagnoses else Reason.STABILISED
    metrics = {**(diagnoses[0].metrics if diagnoses else {}), **metrics}
    return verdict(reason in rule.stop_on, reason, metrics=metrics, diagnose=lambda: diagnoses)


def judge_below_threshold(
    rule: ThresholdRule, trace: Trace, name: str, measure: Callable[[Curve], dict[str, float]]
) -> Verdict:
    """Return the verdict of a rule that stops once the number ``name`` of those ``measure`` returns is close to 0."""
    curve = read_curve(rule, trace, rule.metric, rule.window)
    metrics: dict[str, float] = {"threshold": rule.threshold}
    if verdict := check_readiness(rule, curve, trace, metrics):
        return verdict
    metrics |= measure(curve)
    return judge_condition(rule, curve, metrics, abs(metrics[name]) < rule.threshold)


def require_positive_level(rule: object, level: float, step: int) -> None:
    """Raise if the level of the loss, by which the rule divides, is not positive."""
    if not level > 0:
        raise RefusedInput(
            [
                f"{type(rule).__name__} divides by the level of the loss, which is {level:.6g} at step {step}: "
                "use Dvar or Trend for a loss that is not positive, such as a paired one"
            ]
        )


_SOURCE = "_source"


def format_rule(rule: Any) -> str:
    """Return the rule as Python source, without the settings that have their default.

    Every verdict holds it, and writing it takes longer than many a judgement: it is written once for each rule.
    """
    attributes = vars(rule)
    if _SOURCE not in attributes:
        attributes[_SOURCE] = _write_rule(rule)
    return str(attributes[_SOURCE])


def _write_rule(rule: Any) -> str:
    settings = [
        f"{item.name}={getattr(rule, item.name)!r}" for item in fields(rule) if getattr(rule, item.name) != item.default
    ]
    return f"{type(rule).__name__}({', '.join(settings)})"


# --- checks of settings ---------------------------------------------------------------------------------------------


def raise_problems(problems: list[str]) -> None:
    """Raise all problems together, if there are any."""
    if problems:
        raise RefusedInput(problems)


def window_problems(window: Any) -> list[str]:
    """Return what is wrong with a window."""
    if is_whole_number(window) and window >= MIN_RECORDS:
        return []
    return [f"window must be a whole number of steps, {MIN_RECORDS} or more, got {window!r}"]


def threshold_rule_problems(rule: ThresholdRule) -> list[str]:
    """Return what is wrong with the settings that the rules of Appendix E share."""
    problems = window_problems(rule.window)
    if not is_number(rule.threshold) or not 0 < rule.threshold < math.inf:
        problems.append(f"threshold must be a finite number above 0, got {rule.threshold!r}")
    return problems + reason_problems(rule.stop_on)


def reason_problems(
    stop_on: Any, allowed: tuple[Reason, ...] = (*CONDITION_REASONS, Reason.NO_CHANGE, Reason.NON_FINITE)
) -> list[str]:
    """Return what is wrong with ``stop_on``."""
    if isinstance(stop_on, tuple) and stop_on and all(reason in allowed for reason in stop_on):
        return []
    names = ", ".join(repr(reason) for reason in allowed)
    return [f"stop_on must be a tuple of one or more of {names}, got {stop_on!r}"]


def is_whole_number(value: Any) -> bool:
    """Return whether ``value`` is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is an int or a float, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)
