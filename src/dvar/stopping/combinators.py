"""The cap that every run has, and rules made of rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

from dvar.stopping.diagnosis import Diagnosis, Reason
from dvar.stopping.rule import Rule, refuse, whole
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict


@dataclass(frozen=True)
class FixedSteps:
    """Stop at the record made after `max_steps` updates: the cap that every run has.

    Raises: RefusedInput when `max_steps` is not a whole number of at least 1.
    Source: Section 4.1, the "Baseline" and "Few iters" runs.
    """

    max_steps: int

    def __post_init__(self) -> None:
        refuse(_count_problems("max_steps", self.max_steps))

    def __call__(self, trace: Trace) -> Verdict:
        stop = trace.last_step >= self.max_steps
        metrics = {"max_steps": self.max_steps}
        return Verdict(stop, Reason.CAP if stop else Reason.RUNNING, trace.last_step, repr(self), metrics)


@dataclass(frozen=True)
class AnyOf:
    """Stop as soon as one of `rules` stops.

    The reason is "non-finite" if it is so for one rule, else that of the first rule that stops, else that of the first
    rule.  The diagnoses of all come with it, and the metrics of all that do not contradict those of the chosen one, so
    that a run stopped by its cap still tells how far it was from converging.

    Raises: RefusedInput when there is no rule, or one that cannot be called.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        refuse(_rules_problems("AnyOf", self.rules))

    def __call__(self, trace: Trace) -> Verdict:
        return _joined([rule(trace) for rule in self.rules], any)


@dataclass(frozen=True)
class AllOf:
    """Stop once all of `rules` stop at the same record.

    The reason is "non-finite" if it is so for one rule, else that of the first rule that does not stop, else that of
    the first rule; metrics and diagnoses as in `AnyOf`.

    Raises: RefusedInput when there is no rule, or one that cannot be called.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        refuse(_rules_problems("AllOf", self.rules))

    def __call__(self, trace: Trace) -> Verdict:
        return _joined([rule(trace) for rule in self.rules], all)


@dataclass(frozen=True)
class NotBefore:
    """`rule`, but for its stops before `step`: these are "warming up".  A loss that is not finite is told at any step.

    Raises: RefusedInput when `step` is not a whole number of at least 1 or the rule cannot be called.
    """

    rule: Rule
    step: int

    def __post_init__(self) -> None:
        refuse(_rules_problems("NotBefore", (self.rule,)) + _count_problems("step", self.step))

    def __call__(self, trace: Trace) -> Verdict:
        verdict = self.rule(trace)
        if verdict.step >= self.step or not verdict.stop or verdict.reason is Reason.NON_FINITE:
            return verdict
        metrics = {**verdict.metrics, "not_before": self.step}
        return replace(verdict, stop=False, reason=Reason.WARMING_UP, metrics=metrics)


@dataclass(frozen=True)
class AtMost:
    """`rule`, and the cap: stop at the record made after `max_steps` updates at the latest.

    Raises: RefusedInput when `max_steps` is not a whole number of at least 1 or the rule cannot be called.
    """

    rule: Rule
    max_steps: int

    def __post_init__(self) -> None:
        refuse(_rules_problems("AtMost", (self.rule,)) + _count_problems("max_steps", self.max_steps))

    def __call__(self, trace: Trace) -> Verdict:
        return _joined([self.rule(trace), self._cap(trace)], any)

    @cached_property
    def _cap(self) -> FixedSteps:
        return FixedSteps(self.max_steps)


def _joined(verdicts: list[Verdict], together: Callable[[Iterable[bool]], bool]) -> Verdict:
    """One verdict for all: a value that is not finite speaks first, then the first that says what all say together."""
    stop = together(verdict.stop for verdict in verdicts)
    chosen = min(verdicts, key=lambda verdict: (verdict.reason is not Reason.NON_FINITE, verdict.stop is not stop))
    metrics = dict(chosen.metrics)
    for verdict in verdicts:
        # All or nothing: the ratio of one rule beside the threshold of another would be a lie.
        if all(name not in metrics or metrics[name] == value for name, value in verdict.metrics.items()):
            metrics |= verdict.metrics
    return replace(chosen, stop=stop, metrics=metrics, diagnose=partial(_all_diagnoses, verdicts))


def _all_diagnoses(verdicts: list[Verdict]) -> tuple[Diagnosis, ...]:
    found: list[Diagnosis] = []
    for diagnosis in chain.from_iterable(verdict.diagnoses for verdict in verdicts):
        if diagnosis not in found:  # two rules may say the same of one curve
            found.append(diagnosis)
    return tuple(found)


def _count_problems(name: str, count: Any) -> list[str]:
    if whole(count) and count >= 1:
        return []
    return [f"{name} must be a whole number of updates, 1 or more, got {count!r}"]


def _rules_problems(name: str, rules: Any) -> list[str]:
    if not isinstance(rules, tuple) or not rules:
        return [f"{name} needs one rule at least, in a tuple, got {rules!r}: pass for example (FixedSteps(1000),)"]
    return [
        f"{name} takes rules, which are called on a trace, got {rule!r}: pass for example FixedSteps(1000)"
        for rule in rules
        if not callable(rule) or isinstance(rule, type)
    ]
