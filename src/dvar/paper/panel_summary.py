"""The plain summary of the panel, ten lines that head the page of results."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dvar.analysis.panel import CONSTANT, OCTAVE, OCTAVE_CHEAP, PERFECT, PanelRun, PanelStops
from dvar.analysis.panel_comparison import Comparison, average_errors, compare_rules
from dvar.paper.panel_default import describe_default
from dvar.paper.panel_results import PanelResults
from dvar.paper.result import format_estimate, format_number, method_title

MAX_LINES = 10
_ANSWERS = {
    "won": "{first} stops nearer to the right step than {second}",
    "lost": "{first} stops further from the right step than {second}",
    "tie": "no difference can be seen between {first} and {second}",
}
_OPPONENTS = ("a fixed number of steps", "a number of steps corrected for the rate", "the published rule, tuned")


def summarise_panel(results: PanelResults) -> tuple[str, ...]:
    """Return what the panel shows in at most ten plain lines: what is found, what is not, and what it means."""
    runs, ends = results.panel.runs, results.ends
    methods = ", ".join(map(method_title, sorted({run.run.method for run in ends.runs}, reverse=True)))
    lines = [
        f"Asked: does an adaptive stop pay where the time scale of training is not known? Read from {len(runs)} "
        f"recorded runs of {len({run.run.concept for run in runs})} concepts on {_name_models(runs)}; errors are in "
        "octaves, factors of two in steps.",
        *(
            _describe_registered(number, comparison, opponent, claim)
            for number, (comparison, opponent, claim) in enumerate(
                zip(results.comparisons, _OPPONENTS, results.claims, strict=True), start=1
            )
        ),
        f"At a quarter and at four times the preset's learning rate ({methods}) octave is "
        f"{_error(ends, OCTAVE)} octaves off, a fixed number of steps {_error(ends, CONSTANT)}; a rule that knew the "
        f"other half of the images would be {_error(ends, PERFECT)} off.",
        _describe_preset(results),
        _describe_others(results),
        _describe_cost(results),
        f"{_advise(results)} {describe_default(results)}",
        "Not shown here: anything about Stable Diffusion or another large model, and anything about images that people "
        "judge.",
    ]
    return tuple(line for line in lines if line)


def _describe_registered(number: int, comparison: Comparison, opponent: str, claim: bool) -> str:
    answer = _ANSWERS[comparison.outcome].format(first=OCTAVE, second=opponent)
    doubt = "" if claim or comparison.outcome == "tie" else " (not claimed: one before was not won)"
    return (
        f"Pre-registered {number}: {answer}, {format_estimate(comparison.difference)} octaves over "
        f"{comparison.difference.concepts} concepts{doubt}."
    )


def _describe_preset(results: PanelResults) -> str:
    comparison = compare_rules(results.presets, OCTAVE, CONSTANT)
    if comparison.side == "too few concepts":
        return ""
    answer = _ANSWERS[comparison.side].format(first=OCTAVE, second=_OPPONENTS[0])
    return (
        f"At the preset itself, where the time scale is known: {answer}, {format_estimate(comparison.difference)} "
        f"octaves over {comparison.difference.concepts} concepts."
    )


def _describe_others(results: PanelResults) -> str:
    outcomes: dict[str, list[str]] = {}
    for title, stops in results.others.items():
        outcomes.setdefault(compare_rules(stops, OCTAVE, CONSTANT).side, []).append(title)
    words = {"won": "nearer at", "lost": "further at", "tie": "no difference can be seen at"}
    parts = [f"{words[outcome]} {', '.join(titles)}" for outcome, titles in outcomes.items() if outcome in words]
    line = f"Other changes, octave against a fixed number of steps, not pre-registered: {'; '.join(parts)}."
    return line if parts else ""


def _describe_cost(results: PanelResults) -> str:
    late = _median_distance(results.ends)
    direction = "late" if late > 0 else "early"
    share = results.probe_share()
    part = format_number(100 * share, 1)
    cost = f", and its probes take {part} % of a run's time on a CPU" if np.isfinite(share) else ""
    cheap = format_estimate(compare_rules(results.ends, OCTAVE_CHEAP, CONSTANT).difference)
    return (
        f"In the median octave stops {format_number(abs(late), 2)} octaves {direction} at these rates. Its cheap form, "
        f"which --rule octave has by default, differs from a fixed number of steps by {cheap} octaves{cost}."
    )


def _advise(results: PanelResults) -> str:
    first, second, _ = (comparison.outcome for comparison in results.comparisons)
    if first == "won" and second == "lost":
        return (
            "For a user: where a good number of steps is known at one learning rate, multiply it by the old rate over "
            "the new one; octave is for where none is known."
        )
    if first == "won":
        return "For a user: where the learning rate has changed and no number of steps is known, let octave stop."
    if first == "lost":
        return "For a user: octave is no reason to give up a fixed number of steps."
    return "For a user: nothing here is a reason to prefer an adaptive stop to a fixed number of steps, or the reverse."


def _name_models(runs: Sequence[PanelRun]) -> str:
    models = sorted({str(run.run.config["pretrained_model_name_or_path"]) for run in runs})
    return f"the bundled model {models[0]}" if len(models) == 1 else f"the bundled models {' and '.join(models)}"


def _error(stops: PanelStops, rule: str) -> str:
    return format_number(average_errors(stops, rule, stops.runs).mean, 2)


def _median_distance(stops: PanelStops) -> float:
    def distance(run: PanelRun) -> float:
        return float(np.log2(max(stops.stops[OCTAVE][run].step, 1.0) / run.oracle))

    return float(np.median([distance(run) for run in stops.runs]))
