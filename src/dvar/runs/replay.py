"""Stopping rules replayed on a recorded trace."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.runs.config import ALL_RULES, ReplayConfig
from dvar.stopping.rule import build_rule
from dvar.stopping.rules import RULES, Dvar, Rule
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict


@dataclass(frozen=True)
class ReplayOutcome:
    """The answer of one rule to a trace.

    Attributes:
        name: Name of the rule in `RULES`.
        verdict: Its verdict where it stops, or else at the end; None when the rule cannot judge the trace.
        refusal: Why the rule cannot judge the trace.
    """

    name: str
    verdict: Verdict | None
    refusal: str = ""

    @property
    def stop(self) -> int | None:
        """The step at which the rule stops; None when it does not."""
        return self.verdict.step if self.verdict and self.verdict.stop else None

    @property
    def sentence(self) -> str:
        """The sentence of the verdict, or the refusal."""
        return self.verdict.sentence if self.verdict else self.refusal


def replay_rules(trace: Trace, config: ReplayConfig) -> list[ReplayOutcome]:
    """Return the outcome of each rule that ``config`` names, in the order of `RULES`.

    Raises:
        RefusedInput: The settings of a rule are wrong, or no rule can judge the trace.
    """
    rules, problems = dict[str, Rule](), list[str]()
    settings = {item.name: getattr(config, item.name) for item in fields(config)}
    for name in RULES:
        if name in config.rule or ALL_RULES in config.rule:
            try:
                rules[name] = build_rule(name, settings)
            except RefusedInput as error:
                problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise RefusedInput(problems)
    outcomes = [_judge(name, trace, rule) for name, rule in rules.items()]
    if not any(outcome.verdict for outcome in outcomes):
        raise RefusedInput(outcome.refusal for outcome in outcomes)
    return outcomes


def replay_rule(trace: Trace, rule: Rule) -> Iterator[Verdict]:
    """Yield the verdict after each evaluation of ``trace``, as if it were being recorded."""
    past = Trace(trace.header)
    for record in trace.records:
        past.record(**record)
        if LOSS in record:
            yield rule(past)


def compute_ratios(trace: Trace, rule: Dvar) -> NDArray[np.float64]:
    """Return DVAR's ratio after each evaluation of ``trace``, shape (evaluations,); nan where it had none yet."""
    metrics = (verdict.metrics for verdict in replay_rule(trace, rule))
    return np.array([values["ratio"] if "total_var" in values else np.nan for values in metrics])


def _judge(name: str, trace: Trace, rule: Rule) -> ReplayOutcome:
    verdict = None
    try:
        for verdict in replay_rule(trace, rule):
            if verdict.stop:
                break
    except RefusedInput as error:
        return ReplayOutcome(name, None, str(error))
    return ReplayOutcome(name, verdict, "" if verdict else "the trace holds no evaluation")
