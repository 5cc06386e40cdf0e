"""Every stopping rule, ranked on recorded runs: tables, figures and what they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any

import numpy as np

from dvar.analysis.eligibility import (
    MAX_GRADIENT,
    MIN_EARLY,
    MIN_ERRORS,
    MIN_JITTERS,
    MIN_RUNS,
    MIN_WAY,
    Eligibility,
    judge_eligibility,
)
from dvar.analysis.families import FAMILIES
from dvar.analysis.rule_ranking import (
    CONTROL,
    ORACLE_NAME,
    RANDOM_NAME,
    RankedRule,
    compare_errors,
    compute_ranking,
    evaluate_all,
    tune_rules,
)
from dvar.analysis.stop_quality import (
    MIN_CONCEPTS,
    ORACLE,
    PREMATURE,
    LearningCurve,
    MeanInterval,
    mean_over_concepts,
)
from dvar.analysis.strategies import baseline_cap, can_evaluate
from dvar.errors import RefusedInput, name_some
from dvar.html.tables import Column
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    describe_tuning,
    format_estimate,
    format_number,
    format_percent,
    method_title,
)
from dvar.paper.style import INK, NOISE, SIGNAL, SOFT, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import CHOOSE, RecordedRun

OTHER_SHARES = (0.8, 0.95)
_CONTROLS = frozenset({ORACLE_NAME, RANDOM_NAME, "Baseline", CONTROL})


def rank_rules(archive: RecordingArchive, notify: Callable[[str], None] = lambda line: None) -> ExperimentResult:
    """Rank all rules with one setting for each method, with one setting for all, and on each method separately.

    Methods that are not eligible are left out; those that cannot be judged are not.

    Args:
        archive: The recorded runs.
        notify: Called with lines of progress.
    """
    verdicts = {method: judge_eligibility(archive, method) for method in archive.methods}
    methods = [method for method, verdict in verdicts.items() if not (verdict and verdict.failures)]
    if not methods:
        raise RefusedInput(["rules are ranked on no method here: " + " ".join(_describe_ineligible(verdicts))])
    runs = tuple(run for method in methods for run in archive.runs_of(method) if LearningCurve.of_run(run).learned)
    if not runs:
        raise RefusedInput(["no recorded run has learned anything that its scores show: record longer runs"])
    sources = {run: {method: archive.runs_to_tune_on(method, run.concept) for method in methods} for run in runs}
    used = dict.fromkeys(other for of_run in sources.values() for others in of_run.values() for other in others)
    evaluate_all(tuple(used), notify)
    notify(f"ranking the rules on {len(runs)} runs")
    own = {run: tune_rules(of_run[run.method]) for run, of_run in sources.items()}
    common = {run: tune_rules(tuple(chain.from_iterable(of_run.values()))) for run, of_run in sources.items()}
    scopes = {
        "one setting per method": compute_ranking(runs, own),
        "one setting, in shares of Baseline's cap, for all methods": compute_ranking(runs, common),
    }
    comparisons = [line for scope, ranking in scopes.items() for line in _compare_with_constant(scope, ranking)]
    for method in methods if len(methods) > 1 else ():
        of_method = tuple(run for run in runs if run.method == method)
        if of_method:
            scopes[f"only {method_title(method)}, with its own setting"] = compute_ranking(of_method, own)
    unlearned = sum(len(archive.runs_of(method)) for method in methods) - len(runs)
    paragraphs = (
        _describe_ceiling(runs),
        *_describe_ineligible(verdicts),
        *_describe_omissions(archive, methods, unlearned),
        *_describe_unreadable(runs),
        *comparisons,
    )
    tuning = describe_tuning(archive)
    tables = [_table_of_rules(f"scope-{index}", *scope, tuning) for index, scope in enumerate(scopes.items())]
    plots = [_plot_distances(f"scope-{index}", *scope) for index, scope in enumerate(list(scopes.items())[:2])]
    return ExperimentResult(paragraphs, (*tables, _table_of_eligibility(verdicts, runs)), tuple(plots))


def _summarise_rule(rule: RankedRule, control: RankedRule | None) -> dict[str, Any]:
    """Return the numbers of one line of the ranking."""
    low, median, high = np.percentile(rule.distances, (10, 50, 90))
    return {
        "rule": rule.rule,
        "setting": rule.setting,
        "error": mean_over_concepts(rule.runs, rule.errors),
        "against control": compare_errors(rule, control) if control and control is not rule else None,
        "median": float(median),
        "low": float(low),
        "high": float(high),
        "kept median": float(np.median([quality.kept_distance for quality in rule.outcomes])),
        "gain kept": mean_over_concepts(rule.runs, [quality.gain_kept for quality in rule.outcomes]),
        "context lost": mean_over_concepts(rule.runs, [quality.context_lost for quality in rule.outcomes]),
        "premature": float(np.mean([quality.premature for quality in rule.outcomes])),
        "wasteful": float(np.mean([quality.wasteful for quality in rule.outcomes])),
        "censored": float(np.mean([quality.censored for quality in rule.outcomes])),
        "steps": float(np.mean(rule.stops)),
        "cost": rule.cost,
    }


def _format_estimate(estimate: MeanInterval | None) -> str:
    """Return a mean with its interval where there is one."""
    return "–" if estimate is None else format_estimate(estimate)


def _format_range(row: Mapping[str, Any]) -> str:
    low, median, high = (format_number(row[name], 2) for name in ("low", "median", "high"))
    return f"{median} ({low} … {high})"


def _format_shares(row: Mapping[str, Any]) -> str:
    return " · ".join(f"{100 * row[share]:.0f}" for share in ("premature", "wasteful", "censored"))


COLUMNS: tuple[Column[Mapping[str, Any]], ...] = (
    Column("Rule", itemgetter("rule")),
    Column("Setting", itemgetter("setting")),
    Column("Octaves from the oracle", itemgetter("error"), _format_estimate),
    Column(f"Against {CONTROL.lower()}", lambda row: _format_estimate(row["against control"])),
    Column("log₂(stop / oracle), median (10–90 %)", lambda row: row, _format_range),
    Column("log₂(kept / oracle), median", itemgetter("kept median"), partial(format_number, digits=2)),
    Column("Gain kept", itemgetter("gain kept"), _format_estimate),
    Column("Context lost", lambda row: row["context lost"].mean, format_number),
    Column("Premature · wasteful · censored, %", lambda row: row, _format_shares),
    Column("Steps", itemgetter("steps"), "{:.0f}".format),
    Column("Thousand forwards to decide", lambda row: row["cost"] / 1000, partial(format_number, digits=1)),
)


def _table_of_rules(name: str, scope: str, ranking: Sequence[RankedRule], tuning: str) -> Table:
    runs = _ranked_runs(ranking)
    control = next((rule for rule in ranking if rule.rule == CONTROL), None)
    data = [_summarise_rule(rule, control) for rule in ranking]
    caption = (
        f"{scope[0].upper() + scope[1:]}; {len(runs)} runs. Rules are ranked by the distance of their stops from the "
        f"oracle, the first step with {100 * ORACLE:.0f} % of the gain in Train CLIP image: what they train to "
        "decides, and not what they keep. Baseline and CLIP-s keep their best checkpoint, all others the last; gain "
        "and context are those of what is kept. In brackets: 95 % interval from resampling concepts; differences are "
        f"paired by concept, and below 0 is better. Premature: less than {100 * PREMATURE:.0f} % of the gain; "
        "wasteful: more than twice the oracle; censored runs count with their last recorded step. Settings are "
        f"windows as shares of Baseline's cap and thresholds. {tuning} {Provenance.of(runs)}"
    )
    best = 1 if ranking[0].rule == ORACLE_NAME else 0
    return build_table(name, caption, COLUMNS, data, data=data, bold=[(best, 2)])


def _ranked_runs(ranking: Sequence[RankedRule]) -> tuple[RecordedRun, ...]:
    """Return the runs of a ranking, each once."""
    return next(rule.runs for rule in ranking if rule.rule not in (RANDOM_NAME, ORACLE_NAME))


def _plot_distances(name: str, scope: str, ranking: Sequence[RankedRule]) -> Plot:
    runs = _ranked_runs(ranking)
    figure, panels = axes(1, 1, width=8.0, height=0.3 * len(ranking) + 0.3)
    panel = panels[0][0]
    for place, rule in enumerate(ranking):
        low, median, high = np.percentile(rule.distances, (10, 50, 90))
        colour = SIGNAL if rule.rule.startswith("DVAR") else INK if rule.rule not in _CONTROLS else NOISE
        panel.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        panel.plot([median], [place], "o", color=colour, markersize=5)
    panel.axvline(0, color=SOFT, linewidth=0.8)
    panel.set_yticks(range(len(ranking)), [rule.rule for rule in ranking])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("octaves from the oracle: too early to the left, too late to the right")
    caption = (
        f"{scope[0].upper() + scope[1:]}: median and 10–90 % range over {len(runs)} runs of log2(stop / oracle), the "
        f"nearest to the oracle at the top. Grey: the oracle and controls. {Provenance.of(runs)}"
    )
    data = [{"rule": rule.rule, "distances": rule.distances} for rule in ranking]
    return Plot(name, caption, figure, data)


def _describe_ceiling(runs: Sequence[RecordedRun]) -> str:
    distances = []
    for share in (ORACLE, *OTHER_SHARES):
        pairs = [
            (LearningCurve.of_run(run, CHOOSE).step_at(share), LearningCurve.of_run(run).step_at(share)) for run in runs
        ]
        octaves = [abs(float(np.log2(max(step, 1.0) / max(other, 1.0)))) for step, other in pairs]
        distances.append(f"{np.nanmean(octaves):.2f} octaves apart at q ≥ {share}")
    images = runs[0].scores("train", "clip_image", CHOOSE)[1].shape[1]
    return (
        "The oracle of a run is the first step with a share q of its gain in Train CLIP image; distances are in "
        f"octaves, factors of two in steps. Two oracles of the same run, each from {images} images of its own, are "
        f"{', '.join(distances)}: no rule can be shown to do better than that."
    )


def _describe_ineligible(verdicts: Mapping[str, Eligibility | None]) -> list[str]:
    """Return a sentence for each method that rules are not ranked on, and one for those that could not be judged."""
    sentences = [
        f"{method_title(method)} is not eligible, so rules are not ranked on it: {'; '.join(verdict.failures)}."
        for method, verdict in verdicts.items()
        if verdict and verdict.failures
    ]
    unknown = [method_title(method) for method, verdict in verdicts.items() if not verdict]
    if unknown:
        sentences.append(f"Fewer than {MIN_RUNS} tuning runs: the eligibility of {', '.join(unknown)} is unknown.")
    return sentences


EligibilityRow = tuple[str, Eligibility | None]
"""A method and its eligibility, where it could be judged."""


def _figure_column(title: str, text: Callable[[Eligibility], str]) -> Column[EligibilityRow]:
    """Return a column of text about an eligibility, with a dash where there is none."""
    return Column(title, lambda row: text(row[1]) if row[1] else "–")


def _format_gain(verdict: Eligibility) -> str:
    ceiling = f" of {format_number(verdict.ceiling, 2)}" if np.isfinite(verdict.ceiling) else ""
    return f"{format_number(verdict.start, 2)} → {format_number(verdict.end, 2)}{ceiling}"


def _format_share(share: float) -> str:
    return format_percent(share) if np.isfinite(share) else "–"


ELIGIBILITY_COLUMNS: tuple[Column[EligibilityRow], ...] = (
    Column("Method", lambda row: method_title(row[0])),
    _figure_column("Runs", lambda verdict: f"{verdict.runs}"),
    _figure_column("Cap", lambda verdict: f"{verdict.cap}"),
    _figure_column("Score, start → end", _format_gain),
    _figure_column("Gain, standard errors over concepts", lambda verdict: format_number(verdict.errors, 1)),
    _figure_column("Way to the ceiling", lambda verdict: _format_share(verdict.way)),
    _figure_column("Of the gain by half the cap", lambda verdict: format_percent(verdict.early)),
    _figure_column("Fall of L_det over its jitter", lambda verdict: format_number(verdict.jitters, 0)),
    _figure_column("Runs without a large gradient", lambda verdict: _format_share(verdict.calm)),
    _figure_column("Runs that stay below their first L_det", lambda verdict: _format_share(verdict.below)),
    Column("Rules are ranked", lambda row: "not judged" if not row[1] else "no" if row[1].failures else "yes"),
)


def _table_of_eligibility(verdicts: Mapping[str, Eligibility | None], ranked: Sequence[RecordedRun]) -> Table:
    caption = (
        "Eligibility: rules can be told apart only where a method learns, early, and L_det shows it. Runs of the "
        "tuning concepts up to Baseline's cap; the score is the recogniser's identity where it is known, else Train "
        f"CLIP image. Bars: {MIN_ERRORS:g} standard errors, {100 * MIN_WAY:.0f} % of the way where the ceiling is "
        f"known, {100 * MIN_EARLY:.0f} % of the gain by half of the cap, {MIN_JITTERS:g} jitters. Two more columns say "
        f"how smooth training was: the share of runs with no gradient above {MAX_GRADIENT:g} times the median, and of "
        f"those whose L_det stays below its first value after its minimum. What was ranked: "
        f"{Provenance.of(ranked)}"
    )
    data = [{"method": method, **(asdict(verdict) if verdict else {})} for method, verdict in verdicts.items()]
    return build_table("gate", caption, ELIGIBILITY_COLUMNS, list(verdicts.items()), data=data)


def _describe_omissions(archive: RecordingArchive, methods: Sequence[str], unlearned: int) -> list[str]:
    sentences = []
    if unlearned:
        sentences.append(f"{unlearned} runs gained less than three standard deviations of their scores; left out.")
    untuned = [
        method_title(method)
        for method in methods
        if not all(archive.runs_to_tune_on(method, run.concept) for run in archive.runs_of(method))
    ]
    if untuned:
        sentences.append(
            f"No concept to tune on was recorded for {', '.join(untuned)}: tuned rules are left out there."
        )
    return sentences


def _describe_unreadable(runs: Sequence[RecordedRun]) -> list[str]:
    """Return a sentence for the rules that read a series which some run lacks, with these runs."""
    rules: dict[tuple[str, ...], list[str]] = {}
    for family in FAMILIES:
        rule = family.strategy(family.settings()[0], baseline_cap(runs[0])).rule
        if lacking := tuple(run.name for run in runs if not can_evaluate(rule, run)):
            rules.setdefault(lacking, []).append(family.name)
    return [
        f"Left out, because {name_some(lacking)} lacks a series that they read: {', '.join(names)}."
        for lacking, names in rules.items()
    ]


def _compare_with_constant(scope: str, ranking: Sequence[RankedRule]) -> tuple[str, ...]:
    """Say whether DVAR stops nearer to the oracle than one number of steps does, or that it cannot be said."""
    by_name = {rule.rule: rule for rule in ranking}
    if CONTROL not in by_name or "DVAR" not in by_name:
        return ()
    difference = compare_errors(by_name["DVAR"], by_name[CONTROL])
    detail = f"({_format_estimate(difference)} octaves of distance over {difference.concepts} concepts)"
    constant = "a constant number of steps that was tuned in the same way"
    if difference.concepts < MIN_CONCEPTS:
        return (f"With {scope}, DVAR cannot be compared with {constant} {detail}: too few concepts.",)
    if difference.low <= 0 <= difference.high:
        return (f"With {scope}, DVAR and {constant} are a tie {detail}; which stops nearer to the oracle is not seen.",)
    direction = "nearer to" if difference.high < 0 else "further from"
    return (f"With {scope}, DVAR stops {direction} the oracle than {constant} {detail}.",)
