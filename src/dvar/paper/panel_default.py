"""Whether the panel makes octave the default rule: the conditions of the protocol, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvar.analysis.panel import CONSTANT, DVAR_TUNED, OCTAVE, OCTAVE_CHEAP, PanelStops
from dvar.analysis.panel_comparison import Comparison, compare_rules
from dvar.analysis.stop_quality import MIN_CONCEPTS
from dvar.config.methods import PAPER_METHODS
from dvar.paper.panel_results import PanelResults
from dvar.paper.result import format_estimate, format_number
from dvar.recordings.panel import PRESET

MAX_LOSS = 0.5
"""Octaves that octave may be further from the right step than the constant at the preset, at most."""
MAX_PROBE_SHARE = 0.1


@dataclass(frozen=True)
class Condition:
    """A condition for a new default.

    Attributes:
        text: What was asked and what was found.
        met: Whether it is met; None where too little is recorded to say.
    """

    text: str
    met: bool | None


def list_default_conditions(results: PanelResults) -> tuple[Condition, ...]:
    """Return the conditions under which octave becomes the default, in the order of docs/protocol.md."""
    first, _, third = results.comparisons
    conditions = [
        Condition(_describe(number, comparison, claim), comparison.outcome == "won" and claim)
        for number, comparison, claim in ((1, first, results.claims[0]), (3, third, results.claims[2]))
    ]
    for second in (CONSTANT, DVAR_TUNED):
        cheap = compare_rules(results.ends, OCTAVE_CHEAP, second)
        conditions.append(
            Condition(f"{OCTAVE_CHEAP} − {second} is {format_estimate(cheap.difference)}", cheap.side == "won")
        )
    conditions.append(_judge_preset(results.main))
    share = results.probe_share()
    conditions.append(
        Condition(
            f"the cheap probes take {format_number(100 * share, 1)} % of a run's time at the preset, on a CPU (not "
            "measured on a GPU)",
            bool(share <= MAX_PROBE_SHARE) if np.isfinite(share) else None,
        )
    )
    return tuple(conditions)


def _describe(number: int, comparison: Comparison, claim: bool) -> str:
    """Return the outcome of a comparison, and that it is not claimed where one before it was not won."""
    unclaimed = comparison.outcome == "won" and not claim
    return f"comparison {number} is {'not claimed' if unclaimed else comparison.outcome}"


def describe_default(results: PanelResults) -> str:
    """Return in one sentence whether octave becomes the default, with what decides it."""
    conditions = list_default_conditions(results)
    if failed := [condition.text for condition in conditions if condition.met is False]:
        return f"The default rule stays what it is: {'; '.join(failed)}."
    if unknown := [condition.text for condition in conditions if condition.met is None]:
        return f"Whether octave becomes the default is not known yet: {'; '.join(unknown)}."
    return f"Octave becomes the default: {'; '.join(condition.text for condition in conditions)}."


def _judge_preset(main: PanelStops | None) -> Condition:
    if main is None:
        return Condition(f"the {len(PAPER_METHODS)} methods at the {PRESET.title} are not recorded whole", None)
    difference = compare_rules(main, OCTAVE, CONSTANT).difference
    names = f"{OCTAVE} − {CONSTANT}"
    text = f"at the preset, over {difference.concepts} concepts, {names} is {format_estimate(difference)}"
    return Condition(text, difference.high < MAX_LOSS if difference.concepts >= MIN_CONCEPTS else None)
