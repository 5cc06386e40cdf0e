"""The cap on steps, and rules that combine other rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

from dvar.stopping.diagnosis import Diagnosis, Reason
from dvar.stopping.rule import Rule, is_whole_number, raise_problems
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict


@dataclass(frozen=True)
class FixedSteps:
    """Stop at the record made after ``max_steps`` updates: the cap that every run has.

    Args:
        max_steps: Updates, at least 1.

    Raises:
        RefusedInput: ``max_steps`` is not a whole number of at least 1.

    Source: Section 4.1, the "Baseline" and "Few iters" runs.
    """

    max_steps: int

    def __post_init__(self) -> None:
        raise_problems(_count_problems("max_steps", self.max_steps))

    def __call__(self, trace: Trace) -> Verdict:
        stop = trace.last_step >= self.max_steps
        metrics = {"max_steps": self.max_steps}
        return Verdict(stop, Reason.CAP if stop else Reason.RUNNING, trace.last_step, repr(self), metrics)


@dataclass(frozen=True)
class AnyOf:
    """Stop as soon as one of ``rules`` stops.

    The reason is "non-finite" if one rule gives it, else that of the first rule that stops, else that of the first
    rule. The verdict has the diagnoses of all rules, and the metrics of every rule that do not contradict those of the
    chosen one, so that the verdict of a run stopped by its cap still says how far it was from converging.

    Args:
        rules: At least one rule, in a tuple.

    Raises:
        RefusedInput: There is no rule, or one that cannot be called.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        raise_problems(_rules_problems("AnyOf", self.rules))

    def __call__(self, trace: Trace) -> Verdict:
        return _combine([rule(trace) for rule in self.rules], any)


@dataclass(frozen=True)
class AllOf:
    """Stop once all of ``rules`` stop at the same record.

    The reason is "non-finite" if one rule gives it, else that of the first rule that does not stop, else that of the
    first rule. Metrics and diagnoses are as in `AnyOf`.

    Args:
        rules: At least one rule, in a tuple.

    Raises:
        RefusedInput: There is no rule, or one that cannot be called.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        raise_problems(_rules_problems("AllOf", self.rules))

    def __call__(self, trace: Trace) -> Verdict:
        return _combine([rule(trace) for rule in self.rules], all)


@dataclass(frozen=True)
class NotBefore:
    """Stop when ``rule`` stops, but not before ``step``.

    An earlier stop becomes "warming up". A verdict of "non-finite" is passed on at any step.

    Args:
        rule: The rule to hold back.
        step: Updates, at least 1.

    Raises:
        RefusedInput: ``step`` is not a whole number of at least 1, or the rule cannot be called.
    """

    rule: Rule
    step: int

    def __post_init__(self) -> None:
        raise_problems(_rules_problems("NotBefore", (self.rule,)) + _count_problems("step", self.step))

    def __call__(self, trace: Trace) -> Verdict:
        verdict = self.rule(trace)
        if verdict.step >= self.step or not verdict.stop or verdict.reason is Reason.NON_FINITE:
            return verdict
        metrics = {**verdict.metrics, "not_before": self.step}
        return replace(verdict, stop=False, reason=Reason.WARMING_UP, metrics=metrics)


@dataclass(frozen=True)
class AtMost:
    """Stop when ``rule`` stops, and at the latest at the record made after ``max_steps`` updates.

    Args:
        rule: The rule that may stop earlier.
        max_steps: Updates, at least 1.

    Raises:
        RefusedInput: ``max_steps`` is not a whole number of at least 1, or the rule cannot be called.
    """

    rule: Rule
    max_steps: int

    def __post_init__(self) -> None:
        raise_problems(_rules_problems("AtMost", (self.rule,)) + _count_problems("max_steps", self.max_steps))

    def __call__(self, trace: Trace) -> Verdict:
        return _combine([self.rule(trace), self._cap(trace)], any)

    @cached_property
    def _cap(self) -> FixedSteps:
        return FixedSteps(self.max_steps)


def _combine(verdicts: list[Verdict], quantifier: Callable[[Iterable[bool]], bool]) -> Verdict:
    """Return one verdict for all: the first that is non-finite, else the first that agrees with the common answer."""
    stop = quantifier(verdict.stop for verdict in verdicts)
    chosen = min(verdicts, key=lambda verdict: (verdict.reason is not Reason.NON_FINITE, verdict.stop is not stop))
    metrics = dict(chosen.metrics)
    for verdict in verdicts:
        # All metrics of a rule or none: the ratio of one rule beside the threshold of another would be false.
        if all(name not in metrics or metrics[name] == value for name, value in verdict.metrics.items()):
            metrics |= verdict.metrics
    return replace(chosen, stop=stop, metrics=metrics, diagnose=partial(_collect_diagnoses, verdicts))


def _collect_diagnoses(verdicts: list[Verdict]) -> tuple[Diagnosis, ...]:
    """Return the diagnoses of all verdicts, each once: two rules may say the same of one curve."""
    diagnoses: list[Diagnosis] = []
    for diagnosis in chain.from_iterable(verdict.diagnoses for verdict in verdicts):
        if diagnosis not in diagnoses:
            diagnoses.append(diagnosis)
    return tuple(diagnoses)


def _count_problems(name: str, count: Any) -> list[str]:
    """Return what is wrong with a number of updates."""
    if is_whole_number(count) and count >= 1:
        return []
    return [f"{name} must be a whole number of updates, 1 or more, got {count!r}"]


def _rules_problems(name: str, rules: Any) -> list[str]:
    """Return what is wrong with the rules that the combinator ``name`` was given."""
    if not isinstance(rules, tuple) or not rules:
        return [f"{name} needs at least one rule, in a tuple, got {rules!r}: pass for example (FixedSteps(1000),)"]
    return [
        f"{name} takes rules, which are called on a trace, got {rule!r}: pass for example FixedSteps(1000)"
        for rule in rules
        if not callable(rule) or isinstance(rule, type)
    ]
