"""The panel: rules where the time scale of training is not known, as tables, a figure and what may be claimed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from dvar.analysis.memorising import RIGHT, ClockQuality, judge_clocks
from dvar.analysis.panel import (
    CONSTANT,
    CORRECTED,
    DVAR_TUNED,
    LATER,
    MIN_LENGTH,
    OCTAVE,
    OCTAVE_CHEAP,
    PERFECT,
    REGISTERED,
    PanelRun,
    PanelStops,
)
from dvar.analysis.panel_comparison import (
    RATE_ENDS,
    Comparison,
    average_errors,
    compare_rules,
)
from dvar.analysis.stop_quality import MIN_CONCEPTS, LearningCurve, MeanInterval
from dvar.html.tables import Column
from dvar.paper.panel_default import describe_default
from dvar.paper.panel_results import RATES, PanelResults
from dvar.paper.panel_summary import summarise_panel
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    format_estimate,
    format_number,
    format_percent,
    method_title,
)
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.panel import PRESET

_DEFAULT, _LATER = "Registered for the default alone", "Looked at later"
_INTERVALS = f"with the 95 % interval from resampling concepts where there are {MIN_CONCEPTS}"
_ROWS = (*REGISTERED, *LATER, PERFECT)
_REGISTERED_ROWS = frozenset((*REGISTERED, PERFECT))


def compare_on_panel(archive: RecordingArchive) -> ExperimentResult:
    """Compare the rules of the protocol on the panel, and those that were looked at later."""
    results = PanelResults.of(archive)
    methods = sorted({run.run.method for run in results.rates.runs}, reverse=True)
    tables = [
        _table_of_comparisons(results),
        _table_of_rates("rates", "Learning rates, all methods", results.rates, results.rates.runs),
        *(
            _table_of_rates(
                f"rates-{method}",
                f"Learning rates, {method_title(method)}",
                results.rates,
                [run for run in results.rates.runs if run.run.method == method],
            )
            for method in methods
        ),
        _table_of_presets(results),
        *([_table_of_others(results)] if results.others else []),
        _table_of_clocks(results),
    ]
    paragraphs = (*_describe_comparisons(results), *_describe_runs(results))
    summary = summarise_panel(results)
    return ExperimentResult(paragraphs, tuple(tables), (_plot_rates(results),), summary=summary)


ErrorRow = tuple[str, list[MeanInterval]]
"""A rule and its mean error on each group of runs."""


def _table_of_rates(name: str, title: str, stops: PanelStops, runs: Sequence[PanelRun]) -> Table:
    groups = [[run for run in runs if run.variation == rate] for rate in RATES]
    groups.append([run for run in runs if run.variation in RATE_ENDS])
    rows = [(rule, [average_errors(stops, rule, group) for group in groups]) for rule in _ROWS]
    titles = (*(title.removeprefix("rate ") for title in RATES), "× 1/4 and × 4")
    caption = (
        f"{title}: mean error of a stop in octaves, |log2(stop / oracle)|, over concepts, {_INTERVALS}. The perfect "
        "rule is the oracle of the other half of the images: the room that is left. Nothing is claimed from this "
        f"table, and rules marked so were looked at later. {_describe_provenance(runs)}"
    )
    return _table_of_errors(name, caption, titles, rows)


def _table_of_presets(results: PanelResults) -> Table:
    stops = results.presets
    methods = sorted({run.run.method for run in stops.runs})
    groups = [[run for run in stops.runs if run.run.method == method] for method in methods]
    rows = [(rule, [average_errors(stops, rule, group) for group in (*groups, stops.runs)]) for rule in _ROWS]
    caption = (
        f"The preset, where nothing is shifted: mean error in octaves by method and over all, {_INTERVALS}. Nothing is "
        "claimed from this table. "
        f"{_describe_provenance(stops.runs)}"
    )
    return _table_of_errors("preset", caption, (*map(method_title, methods), "all"), rows)


def _table_of_errors(name: str, caption: str, titles: Sequence[str], rows: Sequence[ErrorRow]) -> Table:
    """Return a table of mean errors, each with its interval where there are enough concepts."""
    columns: list[Column[ErrorRow]] = [Column("Rule", _name_rule)]
    columns += [Column(title, partial(_format_error, index)) for index, title in enumerate(titles)]
    data = [{"rule": rule, **dict(zip(titles, errors, strict=True))} for rule, errors in rows]
    return build_table(name, caption, columns, rows, data=data)


def _name_rule(row: ErrorRow) -> str:
    return row[0] if row[0] in _REGISTERED_ROWS else f"{row[0]} (later)"


def _format_error(index: int, row: ErrorRow) -> str:
    return format_estimate(row[1][index])


@dataclass(frozen=True)
class ComparisonRow:
    """A line of the table of comparisons.

    Args:
        group: What its runs are.
        name: Its number in the protocol, or "later".
        comparison: The comparison.
        long: The same without runs that are short, where that differs.
        outcome: What may be said.
        perfect: The mean error of the perfect rule on these runs, in octaves.
    """

    group: str
    name: str
    comparison: Comparison
    long: Comparison
    outcome: str
    perfect: float


def _compare(
    stops: PanelStops,
    group: str,
    name: str,
    comparison: Comparison,
    outcome: str | None = None,
    runs: Sequence[PanelRun] | None = None,
) -> ComparisonRow:
    runs = stops.runs if runs is None else runs
    long = compare_rules(stops, comparison.first, comparison.second, [run for run in runs if not run.is_short])
    perfect = average_errors(stops, PERFECT, runs).mean
    return ComparisonRow(group, name, comparison, long, outcome or comparison.side, perfect)


def _table_of_comparisons(results: PanelResults) -> Table:
    rows = [
        _compare(
            results.ends,
            "Registered: learning rates × 1/4 and × 4",
            f"{number}",
            comparison,
            comparison.outcome if claim else f"{comparison.outcome}, not claimed",
        )
        for number, (comparison, claim) in enumerate(zip(results.comparisons, results.claims, strict=True), start=1)
    ]
    # What decides about the default, as the cheap rule is what would be used; nothing else is claimed from it.
    rows += [
        _compare(results.ends, _DEFAULT, "rates × 1/4, × 4", compare_rules(results.ends, OCTAVE_CHEAP, second))
        for second in (CONSTANT, DVAR_TUNED)
    ]
    if results.main:
        main = compare_rules(results.main, OCTAVE, CONSTANT)
        rows.append(_compare(results.main, _DEFAULT, f"{PRESET.title}, main panel", main))
    for title, stops, runs in _list_later_groups(results):
        for second in (CONSTANT, DVAR_TUNED):
            comparison = compare_rules(stops, OCTAVE, second, runs)
            if comparison.difference.concepts:
                rows.append(_compare(stops, _LATER, title, comparison, runs=runs))
    columns: list[Column[ComparisonRow]] = [
        Column("Comparison", lambda row: f"{row.name}: {row.comparison.first} − {row.comparison.second}"),
        Column("Octaves", lambda row: _format_difference(row.comparison)),
        Column("p", lambda row: format_number(row.comparison.p)),
        Column("Without short runs", lambda row: _format_difference(row.long)),
        Column("Perfect rule", lambda row: format_number(row.perfect, 2)),
        Column("Concepts", lambda row: f"{row.comparison.difference.concepts}"),
        Column("Runs", lambda row: f"{row.comparison.runs}"),
        Column("Outcome", lambda row: row.outcome),
    ]
    caption = (
        "Differences of mean errors in octaves, paired by concept, below 0 where the first rule is nearer to the "
        "oracle. The interval resamples concepts; p is the share of sign flips of the concepts' differences that are "
        "as far from 0. Won: the interval lies below 0, in the three registered comparisons with p < 0.05 too; lost: "
        f"above. With fewer than {MIN_CONCEPTS} concepts no interval is given. Short runs last less than "
        f"{MIN_LENGTH:g} oracles. The perfect rule's own error is the room that is left. Registered comparisons are "
        "tested in this order, and none is claimed after one that is not won (docs/protocol.md)."
    )
    data = [
        {
            "group": row.group,
            "name": row.name,
            "first": row.comparison.first,
            "second": row.comparison.second,
            "difference": row.comparison.difference,
            "p": row.comparison.p,
            "runs": row.comparison.runs,
            "without short runs": row.long.difference,
            "perfect rule": row.perfect,
            "outcome": row.outcome,
        }
        for row in rows
    ]
    return build_table("comparisons", caption, columns, rows, data=data, heading=lambda row: row.group)


def _list_later_groups(results: PanelResults) -> list[tuple[str, PanelStops, Sequence[PanelRun]]]:
    """Return the groups of runs that are looked at later: their title, the stops that they are among, and the runs."""
    rates, ends = results.rates, results.ends
    by_rate = [(rate, [run for run in rates.runs if run.variation == rate]) for rate in RATES if rate != PRESET.title]
    methods = sorted({run.run.method for run in ends.runs}, reverse=True)
    by_method = [(method, [run for run in ends.runs if run.run.method == method]) for method in methods]
    whole = {"all learning rates": rates, PRESET.title: results.presets, **results.others}
    return [
        *((rate, rates, runs) for rate, runs in by_rate),
        *((f"{method_title(method)}, rates × 1/4, × 4", ends, runs) for method, runs in by_method),
        *((title, stops, stops.runs) for title, stops in whole.items()),
    ]


def _table_of_others(results: PanelResults) -> Table:
    rows = [
        (rule, [average_errors(stops, rule, stops.runs) for stops in results.others.values()])
        for rule in _ROWS
        if rule != CORRECTED  # the learning rate is the preset's here
    ]
    runs = [run for stops in results.others.values() for run in stops.runs]
    caption = (
        f"Other changes of the time scale, not pre-registered: mean error in octaves over concepts, {_INTERVALS}; "
        f"settings are those of the preset. {_describe_provenance(runs)}"
    )
    return _table_of_errors("others", caption, tuple(results.others), rows)


def _table_of_clocks(results: PanelResults) -> Table:
    runs = results.panel.runs
    columns: list[Column[ClockQuality]] = [
        Column("Signal", lambda clock: clock.name),
        Column("Octaves off", lambda clock: format_estimate(clock.error)),
        Column("Right", lambda clock: format_percent(clock.right.mean)),
        Column("− constant", lambda clock: format_estimate(clock.difference)),
        Column("Runs", lambda clock: f"{clock.runs}"),
        Column("Memorising", lambda clock: f"{clock.memorising}"),
        Column("Right there", lambda clock: format_percent(clock.right_memorising.mean)),
        Column("− constant there", lambda clock: format_estimate(clock.difference_memorising)),
        Column("Supported", lambda clock: "yes" if clock.is_supported else "no"),
    ]
    clocks = judge_clocks(results.panel, runs)
    caption = (
        "The second clock, not one of the three comparisons: the step from which on validation images obey their "
        "prompts clearly less than at the oracle, and signals that would show it, each with a threshold chosen for the "
        "method on the other concepts at the preset. A run that never memorises, a signal that never strikes and a "
        f"constant beyond the record count as twice the record. Right: at most {RIGHT:g} octave off. Supported: nearer "
        "than the constant and right more often than not, by both intervals, over all runs and over those that "
        f"memorise. {_describe_provenance(runs)}"
    )
    data = [
        {
            "signal": clock.name,
            "error": clock.error,
            "right": clock.right,
            "difference": clock.difference,
            "runs": clock.runs,
            "memorising": clock.memorising,
            "right memorising": clock.right_memorising,
            "difference memorising": clock.difference_memorising,
            "supported": clock.is_supported,
        }
        for clock in clocks
    ]
    return build_table("clocks", caption, columns, clocks, data=data)


def _plot_rates(results: PanelResults) -> Plot:
    figure, panels = axes(height=3.0)
    panel = panels[0, 0]
    positions = np.log2([0.25, 0.5, 1, 2, 4])
    groups = [[run for run in results.rates.runs if run.variation == rate] for rate in RATES]
    recorded = [place for place, group in enumerate(groups) if group]  # a line joins what is there
    data = []
    for colour, rule in zip(COLOURS, (OCTAVE, CONSTANT, CORRECTED, DVAR_TUNED, PERFECT), strict=False):
        errors = [average_errors(results.rates, rule, groups[place]).mean for place in recorded]
        panel.plot(positions[recorded], errors, "o-", color=colour, label=rule)
        data.append({"rule": rule, "rates": [RATES[place] for place in recorded], "errors": errors})
    panel.set_xticks(positions, ["× 1/4", "× 1/2", "× 1", "× 2", "× 4"])
    panel.set_xlabel("learning rate over the preset's")
    panel.set_ylabel("octaves from the oracle")
    panel.set_ylim(bottom=0)
    panel.legend()
    caption = f"Mean error of a stop at each learning rate. {_describe_provenance(results.rates.runs)}"
    return Plot("rates", caption, figure, data)


def _describe_comparisons(results: PanelResults) -> list[str]:
    """Return a sentence for each comparison of the protocol, in its order."""
    sentences = []
    for number, (comparison, claim) in enumerate(zip(results.comparisons, results.claims, strict=True), start=1):
        head = f"Comparison {number}, {comparison.first} − {comparison.second}: "
        detail = f"{_format_difference(comparison)} octaves, p = {format_number(comparison.p)}"
        if comparison.outcome == "tie":
            sentences.append(f"{head}a tie ({detail}); which of them is nearer cannot be said.")
        elif claim:
            sentences.append(f"{head}{comparison.outcome} ({detail}).")
        else:
            sentences.append(f"{head}would be {comparison.outcome} ({detail}); not claimed, as one before was not won.")
    return sentences


def _describe_runs(results: PanelResults) -> list[str]:
    """Return sentences about runs that are left out, short or censored."""
    sentences = []
    if unlearned := [run.name for run in results.panel.unlearned]:
        sentences.append(f"{len(unlearned)} runs gained nothing and are left out: {', '.join(unlearned)}.")
    if unreadable := results.archive.unreadable:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in sorted(unreadable.items()))
        sentences.append(f"Recordings that broke or are unfinished, and are left out: {reasons}.")
    curves = [(LearningCurve.of_run(run.run), run.run.name) for run in results.panel.runs]
    clarity, name = min(((curve.plateau - curve.start) / max(curve.noise, 1e-9), name) for curve, name in curves)
    sentences.append(f"The least gain of those that count is {clarity:.0f} standard deviations of the scores ({name}).")
    if short := [run.run.name for run in results.panel.runs if run.is_short]:
        sentences.append(
            f"{len(short)} of {len(results.panel.runs)} runs are shorter than {MIN_LENGTH:g} oracles: "
            f"{', '.join(short)}."
        )
    stops = results.ends.stops
    censored = {rule: sum(stop.censored for stop in stops[rule].values()) for rule in _ROWS if stops.get(rule)}
    if any(censored.values()):
        counts = ", ".join(f"{rule} {count}" for rule, count in censored.items() if count)
        sentences.append(f"Records that ended before the rule stopped, of {len(results.ends.runs)}: {counts}.")
    if np.isfinite(share := results.probe_share()):
        part = format_number(100 * share, 1)
        sentences.append(
            f"Cheap octave's probes take {part} % of a run's time at the preset, by seconds of one thread."
        )
    return [*sentences, describe_default(results)]


def _format_difference(comparison: Comparison) -> str:
    if comparison.difference.concepts < MIN_CONCEPTS:
        return f"{format_number(comparison.difference.mean, 2)}, too few concepts"
    return format_estimate(comparison.difference)


def _describe_provenance(runs: Sequence[PanelRun]) -> str:
    return str(Provenance.of([run.run for run in runs])) if runs else "No run."
