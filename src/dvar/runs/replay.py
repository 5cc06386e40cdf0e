"""A recorded curve judged again: when each rule would have stopped, why, and a picture of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dvar.errors import RefusedInput
from dvar.runs.config import ReplayConfig
from dvar.stopping.rules import Dvar, EmaPercentile, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import LOSS, RELATIVE_LOSS, Trace
from dvar.stopping.verdict import Verdict

RULES: dict[str, Callable[[ReplayConfig], Rule]] = {
    "dvar": lambda config: Dvar(config.window, config.threshold),
    "paper": lambda config: Dvar(config.window, config.threshold, strict_paper=True),
    "ema": lambda config: EmaPercentile(config.window, config.ema_threshold),
    "hall": lambda config: Hall(config.window, config.hall_threshold),
    "trend": lambda config: Trend(config.window, config.trend_threshold, metric=RELATIVE_LOSS),
    "plateau": lambda config: Plateau(LOSS, config.patience, config.min_delta),
}
"""The rules of `dvar replay`, by the name of each: its settings to the rule."""


@dataclass(frozen=True)
class ReplayOutcome:
    """What a rule made of a trace: its verdict where it stops, else the one at the end.

    `verdict` is None where the rule cannot judge such a trace; `refused` then says why.
    """

    name: str
    verdict: Verdict | None
    refused: str = ""

    @property
    def stop(self) -> int | None:
        """The step at which the rule stops; None where it does not."""
        return self.verdict.step if self.verdict and self.verdict.stop else None

    @property
    def why(self) -> str:
        """The rule's sentence, for a person."""
        return self.verdict.sentence if self.verdict else self.refused


def verdicts(trace: Trace, rule: Rule) -> Iterator[Verdict]:
    """Yield what the rule said after each evaluation, as if the trace were being recorded."""
    replayed = Trace(trace.header)
    for row in trace.records:
        replayed.record(**row)
        if LOSS in row:
            yield rule(replayed)


def replayed(trace: Trace, config: ReplayConfig) -> list[ReplayOutcome]:
    """Return the outcome of each rule asked for, in the order of `RULES`.

    Raises: RefusedInput when the settings of a rule are wrong, or no rule can judge the trace.
    """
    names = [name for name in RULES if name in config.rule or "all" in config.rule]
    rules, problems = {}, []
    for name in names:
        try:
            rules[name] = RULES[name](config)
        except RefusedInput as error:
            problems += [said for said in error.problems if said not in problems]
    if problems:
        raise RefusedInput(problems)
    outcomes = [_outcome(name, trace, rule) for name, rule in rules.items()]
    if not any(outcome.verdict for outcome in outcomes):
        raise RefusedInput(outcome.refused for outcome in outcomes)
    return outcomes


def _outcome(name: str, trace: Trace, rule: Rule) -> ReplayOutcome:
    verdict = None
    try:
        for verdict in verdicts(trace, rule):
            if verdict.stop:
                break
    except RefusedInput as error:
        return ReplayOutcome(name, None, str(error))
    return ReplayOutcome(name, verdict, "" if verdict else "the trace holds no evaluation")


# --- the picture ----------------------------------------------------------------------------------------------------
