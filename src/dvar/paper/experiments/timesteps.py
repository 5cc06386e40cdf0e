"""Table 3: how the loss at early, middle and late timesteps correlates with the scores of the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import pearsonr

from dvar.analysis.stop_quality import MeanInterval, mean_over_concepts
from dvar.errors import RefusedInput
from dvar.html.tables import Column
from dvar.paper.published import TABLE_3
from dvar.paper.result import (
    ExperimentResult,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    format_number,
    method_title,
)
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import Floats, Part, RecordedRun

INTERVALS: Mapping[str, tuple[float, float]] = {
    "Begin (0–333)": (0, 1 / 3),
    "Middle (333–666)": (1 / 3, 2 / 3),
    "End (666–1000)": (2 / 3, 1),
    "Full (0–1000)": (0, 1),
}
"""Parts of the noise schedule as shares of it, by their titles."""
FULL = "Full (0–1000)"
SCORES: Mapping[str, tuple[Part, str]] = {
    "Train text score": ("train", "clip_text"),
    "Validation text score": ("validation", "clip_text"),
    "Train image score": ("train", "clip_image"),
    "Validation image score": ("validation", "clip_image"),
}
_SCHEDULE = 1000


@dataclass(frozen=True)
class Correlation:
    """The Pearson correlations between the loss on one interval of timesteps and one score.

    Args:
        levels: Mean over concepts of the correlation along a run.
        changes: The same of first differences.
        pooled: One correlation over all steps of all concepts.
        p: Its p-value, which takes the steps for independent.
    """

    levels: MeanInterval
    changes: MeanInterval
    pooled: float
    p: float


Correlations = Mapping[tuple[str, str], Correlation]
"""By score and interval."""


def table_3(archive: RecordingArchive) -> ExperimentResult:
    """Return the correlations of every method, with first differences as a control."""
    tables, findings = [], []
    for method in archive.methods:
        runs = [run for run in archive.runs_of(method) if run.has_series("stratified") and _timesteps(run).size]
        if not runs:
            raise RefusedInput(
                [f"{method_title(method)}: no recorded run holds stratified draws with their timesteps: record them"]
            )
        correlations = {
            (name, interval): _correlate(runs, name, interval) for name, interval in product(SCORES, INTERVALS)
        }
        tables.append(_table_of_correlations(method, runs, correlations))
        findings.append(_compare_method(method, correlations))
    return ExperimentResult(tuple(findings), (*tables, _table_of_paper()))


def read_interval(run: RecordedRun, score: str, low: float, high: float) -> tuple[Floats, Floats]:
    """Return the mean loss on a part of the schedule and the mean score, both at the scored steps [n].

    Args:
        run: A recorded run with stratified draws.
        score: Title of the score.
        low: Where the interval begins, as a share of the schedule.
        high: Where it ends; itself not in it.
    """
    steps, values = run.series("stratified")
    shares = _timesteps(run) / _SCHEDULE
    inside = (shares >= low) & (shares < high)
    scored, scores = run.scores(*SCORES[score])
    loss = np.interp(scored, steps, values[:, inside].mean(axis=1))
    return loss, scores.mean(axis=1)


def _correlate(runs: Sequence[RecordedRun], score: str, interval: str) -> Correlation:
    pairs = [read_interval(run, score, *INTERVALS[interval]) for run in runs]
    losses = np.concatenate([loss for loss, _ in pairs])
    scores = np.concatenate([values for _, values in pairs])
    pooled = pearsonr(losses, scores) if np.ptp(losses) and np.ptp(scores) else None
    return Correlation(
        levels=mean_over_concepts(runs, [_pearson(*pair) for pair in pairs]),
        changes=mean_over_concepts(runs, [_pearson(np.diff(loss), np.diff(values)) for loss, values in pairs]),
        pooled=float(pooled.statistic) if pooled else float("nan"),
        p=float(pooled.pvalue) if pooled else float("nan"),
    )


def _pearson(values: Floats, others: Floats) -> float:
    if len(values) < 3 or not np.ptp(values) or not np.ptp(others):
        return float("nan")
    return float(np.corrcoef(values, others)[0, 1])


def _timesteps(run: RecordedRun) -> Floats:
    """Return the timestep of each stratified draw; empty where they were not recorded."""
    description = run.trace.header.get("series", {}).get("stratified", {})
    return np.array(description.get("timesteps", []), np.float64)


HEADINGS = {"levels": "Levels", "changes": "First differences (control)"}


Row = tuple[str, str]
"""A line of the table: "levels" or "changes", and a score."""


def _columns(correlations: Correlations) -> list[Column[Row]]:
    def interval_column(interval: str) -> Column[Row]:
        return Column(interval, lambda row: getattr(correlations[row[1], interval], row[0]), _format_estimate)

    def pooled_column(title: str, name: str, format: Callable[[float], str]) -> Column[Row]:
        return Column(
            title,
            lambda row: getattr(correlations[row[1], FULL], name) if row[0] == "levels" else float("nan"),
            format,
        )

    return [
        Column("", lambda row: row[1]),
        *map(interval_column, INTERVALS),
        pooled_column("Pooled, full", "pooled", partial(format_number, digits=2)),
        pooled_column("Naive p", "p", _format_p),
    ]


def _table_of_correlations(method: str, runs: Sequence[RecordedRun], correlations: Correlations) -> Table:
    caption = (
        f"{method_title(method)}: Pearson correlation of L_det with each score along a run, mean over concepts with a "
        "95 % interval from resampling concepts. Pooled: one correlation over all steps of all concepts, whose p-value "
        "takes them for independent, which they are not. Two curves that both move once and then stay correlate "
        "whatever they mean: first differences are the control, near 0 where only the common trend correlates. "
        f"{Provenance.of(runs)} Deviates from the paper: 32 held draws, one from each 32nd of the schedule, and "
        "log-spaced steps."
    )
    data = [
        {"score": name, "interval": interval, **_flatten(correlation)}
        for (name, interval), correlation in correlations.items()
    ]
    rows = list(product(HEADINGS, SCORES))
    return build_table(
        f"correlations-{method}", caption, _columns(correlations), rows, data=data, heading=lambda row: HEADINGS[row[0]]
    )


def _flatten(correlation: Correlation) -> dict[str, Any]:
    estimates = {
        f"{kind} {part}": getattr(getattr(correlation, kind), part)
        for kind in HEADINGS
        for part in ("mean", "low", "high")
    }
    return {**estimates, "pooled": correlation.pooled, "naive p": correlation.p}


def _table_of_paper() -> Table:
    def interval_column(place: int, interval: str) -> Column[str]:
        return Column(interval, lambda name: TABLE_3[SCORES[name]][place], partial(format_number, digits=2))

    columns = [Column[str]("", str), *(interval_column(*pair) for pair in enumerate(INTERVALS))]
    data = [{"score": name, **dict(zip(INTERVALS, TABLE_3[SCORES[name]], strict=True))} for name in SCORES]
    caption = "The paper's Table 3: Stable Diffusion 1.5, 9 concepts pooled, 1500 steps, scores every 50."
    return build_table("paper", caption, columns, list(SCORES), data=data)


def _format_estimate(estimate: MeanInterval) -> str:
    return "–" if not np.isfinite(estimate.mean) else str(estimate).replace("-", "−")


def _format_p(value: float) -> str:
    return "–" if not np.isfinite(value) else "< 0.001" if value < 1e-3 else f"{value:.3f}"


def _compare_method(method: str, correlations: Correlations) -> str:
    means = {name: [correlations[name, interval].levels.mean for interval in INTERVALS] for name in SCORES}
    negative = all(value < 0 for name in ("Train image score", "Validation image score") for value in means[name])
    spread = max(float(np.ptp(values)) for values in means.values())
    detail = f"by {spread:.2f} at most; 0.14 in the paper"
    sentences = (
        f"{method_title(method)}.",
        compare_with_paper(
            negative,
            "image scores rise as L_det falls, at every interval",
            "image scores do not rise as L_det falls at every interval",
        ),
        compare_with_paper(
            spread <= 0.2,
            f"the intervals of a row differ little ({detail})",
            f"the intervals of a row differ by more than a little ({detail})",
        ),
    )
    return " ".join(sentences)
