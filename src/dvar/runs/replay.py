"""Stopping rules replayed on a recorded trace."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.files import parse_json, read_json, regular_file
from dvar.launch.config import TRACE
from dvar.runs.config import ALL_RULES, ReplayConfig
from dvar.schema import find_mismatch
from dvar.stopping.rule import build_rule
from dvar.stopping.rules import RULES, Rule, schedule_problems
from dvar.stopping.trace import LOSS, Trace
from dvar.stopping.verdict import Verdict
from dvar.training.run_layout import CONFIG

_MEASURED = frozenset(("total_var", "octave_gain"))
"""What a verdict of DVAR, and one of octave, holds once there is something to measure."""
_OWN_SETTINGS = {"rule?": str, "window": int, "threshold": float, "probe_every": int}
_LAUNCHED = {"launch": {"rule": str, "settings": {str: float}}}
"""What the settings of a run, and the header of a launched script's trace, hold about the rule."""
_MAX_HEADER = 2**16
"""Bytes that the header of a trace may have."""


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


def read_own_settings(log: Path) -> dict[str, Any]:
    """Return the settings that judged the run or the launched script whose folder or trace ``log`` is.

    They have the names of the fields of `ReplayConfig`; there are none for any other log.
    """
    try:
        settings = read_json((log if log.is_dir() else log.parent) / CONFIG, _OWN_SETTINGS)
    except (OSError, ValueError):
        return _read_launch_settings(log / TRACE if log.is_dir() else log)
    own = {name: settings[name] for name in ("window", "threshold")}
    return {**own, "rule": (settings["rule"],)} if "rule" in settings else own


def _read_launch_settings(trace: Path) -> dict[str, Any]:
    """Return the settings in the header of a launched script's trace; none of any other file."""
    try:
        with regular_file(trace).open("rb") as file:
            header = parse_json(file.readline(_MAX_HEADER))
    except (OSError, ValueError):
        return {}
    if find_mismatch(header, _LAUNCHED):
        return {}
    own = {**header["launch"]["settings"], "rule": (header["launch"]["rule"],)}
    return own if own.keys() <= {item.name for item in fields(ReplayConfig)} else {}


def build_rules(config: ReplayConfig) -> dict[str, Rule]:
    """Return the rules that ``config`` names, in the order of `RULES`.

    Raises:
        RefusedInput: The settings of a rule are wrong.
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
    return rules


def replay_rules(trace: Trace, config: ReplayConfig) -> list[ReplayOutcome]:
    """Return the outcome of each rule that ``config`` names, in the order of `RULES`.

    A curve that is recorded too seldom for the window is warned of.

    Raises:
        RefusedInput: The settings of a rule are wrong, or no rule can judge the trace.
    """
    rules = build_rules(config)
    if problem := find_sparse_records(trace, config.window):
        warnings.warn(problem, stacklevel=2)
    outcomes = [_judge(name, trace, rule) for name, rule in rules.items()]
    if not any(outcome.verdict for outcome in outcomes):
        raise RefusedInput(outcome.refusal for outcome in outcomes)
    return outcomes


def replay_rule(trace: Trace, rule: Rule, after: int = -1) -> Iterator[Verdict]:
    """Yield the verdict after each evaluation of ``trace``, as if it were being recorded.

    Args:
        trace: The trace.
        rule: The rule that judges.
        after: The step up to which no verdict is wanted.
    """
    past = Trace(trace.header)
    for record in trace.records:
        past.record(**record)
        if LOSS in record and record["step"] > after:
            yield rule(past)


def find_sparse_records(trace: Trace, window: int) -> str:
    """Return why a window over the records of ``trace`` will not hold enough of them; an empty text where it will."""
    if len(trace.steps) < 2:
        return ""
    spacing = int(np.median(np.diff(trace.steps)))
    log = trace.header.get("log", {})
    setting = f" ({log['cadence_setting']})" if "cadence_setting" in log else ""
    (problem, *_) = (*schedule_problems(window, spacing, sys.maxsize), "")
    return f"{name_curve(trace)} is recorded too seldom{setting}: {problem}" if problem else ""


def name_curve(trace: Trace) -> str:
    """Return the name of the curve that a trace was read from."""
    return str(trace.header.get("log", {}).get("metric", "L_det"))


def compute_ratios(trace: Trace, rule: Rule) -> NDArray[np.float64]:
    """Return the ratio of DVAR or octave after each evaluation of ``trace``, [evaluations]; nan where there is none."""
    metrics = (verdict.metrics for verdict in replay_rule(trace, rule))
    return np.array([np.nan if _MEASURED.isdisjoint(values) else values.get("ratio", np.nan) for values in metrics])


def _judge(name: str, trace: Trace, rule: Rule) -> ReplayOutcome:
    verdict = None
    try:
        for verdict in replay_rule(trace, rule):
            if verdict.stop:
                break
    except RefusedInput as error:
        return ReplayOutcome(name, None, str(error))
    return ReplayOutcome(name, verdict, "" if verdict else "the trace holds no evaluation")
