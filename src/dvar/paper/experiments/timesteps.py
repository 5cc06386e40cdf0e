"""Table 3: how the loss at early, middle and late timesteps correlates with the scores of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np

from dvar.analysis.stop_quality import Indices, MeanInterval, bootstrap_statistic, mean_over_concepts, weakest
from dvar.errors import RefusedInput
from dvar.html.tables import Column
from dvar.paper.published import TABLE_3
from dvar.paper.result import (
    ExperimentResult,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    format_estimate,
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
_LITTLE = 0.2
"""Largest difference of correlations between intervals that counts as little."""
IMAGE_SCORES = ("Train image score", "Validation image score")


@dataclass(frozen=True)
class Correlation:
    """The Pearson correlations between the loss on one interval of timesteps and one score.

    Args:
        levels: Mean over concepts of the correlation along a run.
        changes: The same of first differences.
        pooled: One correlation over all steps of all concepts, as in the paper, with an interval from resampling
            concepts.
    """

    levels: MeanInterval
    changes: MeanInterval
    pooled: MeanInterval


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
        findings.append(_compare_method(method, runs, correlations))
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
    sums = _sum_products(runs, pairs)
    return Correlation(
        levels=mean_over_concepts(runs, [_pearson(*pair) for pair in pairs]),
        changes=mean_over_concepts(runs, [_pearson(np.diff(loss), np.diff(values)) for loss, values in pairs]),
        pooled=bootstrap_statistic(len(sums), partial(_pool, sums)),
    )


def _sum_products(runs: Sequence[RecordedRun], pairs: Sequence[tuple[Floats, Floats]]) -> Floats:
    """Return what a correlation over any of the concepts is made of, [concepts, 6]: sums of 1, x, y, xx, yy and xy.

    Both x and y are centred over all runs and scaled, so that the sums lose no digits.
    """
    loss, score = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    (x_mean, x_scale), (y_mean, y_scale) = ((of.mean(), of.std() or 1.0) for of in (loss, score))
    sums = {run.concept: np.zeros(6) for run in runs}
    for run, (losses, scores) in zip(runs, pairs, strict=True):
        x, y = (losses - x_mean) / x_scale, (scores - y_mean) / y_scale
        sums[run.concept] += [len(x), x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum()]
    return np.array(list(sums.values()))


def _pool(sums: Floats, chosen: Indices) -> Floats:
    """Return the correlation over all steps of the chosen concepts, from their sums [..., concepts, 6]."""
    count, x, y, xx, yy, xy = np.moveaxis(sums[..., chosen, :].sum(axis=-2), -1, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        pooled: Floats = (xy - x * y / count) / np.sqrt((xx - x * x / count) * (yy - y * y / count))
    return pooled


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

    return [
        Column("", lambda row: row[1]),
        *map(interval_column, INTERVALS),
        Column(
            "Pooled, full",
            lambda row: _format_estimate(correlations[row[1], FULL].pooled) if row[0] == "levels" else "–",
        ),
    ]


def _table_of_correlations(method: str, runs: Sequence[RecordedRun], correlations: Correlations) -> Table:
    caption = (
        f"{method_title(method)}: Pearson correlation of L_det with each score along a run, mean over concepts with a "
        "95 % interval from resampling concepts. Pooled: one correlation over all steps of all concepts, as in the "
        "paper, where differences between concepts count too. Two curves that both move once and then stay correlate "
        "whatever they mean: first differences are the control, near 0 where only the common trend correlates. "
        f"{Provenance.of(runs)} Deviates from the paper: {len(_timesteps(runs[0]))} held draws, spread evenly over the "
        "schedule, and log-spaced steps."
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
    pooled = {f"pooled {part}": getattr(correlation.pooled, part) for part in ("mean", "low", "high")}
    return {**estimates, **pooled}


def _table_of_paper() -> Table:
    def interval_column(place: int, interval: str) -> Column[str]:
        return Column(interval, lambda name: TABLE_3[SCORES[name]][place], partial(format_number, digits=2))

    columns = [Column[str]("", str), *(interval_column(*pair) for pair in enumerate(INTERVALS))]
    data = [{"score": name, **dict(zip(INTERVALS, TABLE_3[SCORES[name]], strict=True))} for name in SCORES]
    caption = "The paper's Table 3: Stable Diffusion 1.5, 9 concepts pooled, 1500 steps, scores every 50."
    return build_table("paper", caption, columns, list(SCORES), data=data)


def _format_estimate(estimate: MeanInterval) -> str:
    return "–" if not np.isfinite(estimate.mean) else format_estimate(estimate)


def _compare_method(method: str, runs: Sequence[RecordedRun], correlations: Correlations) -> str:
    """Compare the pooled correlations, which are the paper's, and say beside them what holds along a run."""
    pooled = [correlations[name, FULL].pooled for name in IMAGE_SCORES]
    paper = [TABLE_3[SCORES[name]][-1] for name in IMAGE_SCORES]
    listed = " and ".join(
        f"{format_estimate(ours)}, {format_number(theirs, 2)} in the paper"
        for ours, theirs in zip(pooled, paper, strict=True)
    )
    levels = [correlations[name, FULL].levels for name in IMAGE_SCORES]
    spread = _measure_spread(runs)
    room = MeanInterval(_LITTLE - spread.mean, _LITTLE - spread.high, _LITTLE - spread.low, spread.concepts)
    sentences = (
        f"{method_title(method)}.",
        compare_with_paper(
            weakest([_negate(interval) for interval in pooled]),
            "image scores rise as L_det falls, pooled over concepts",
            "image scores fall as L_det falls, pooled over concepts",
            f"r, training and validation images: {listed}",
        ),
        f"Along a run the mean correlation is {' and '.join(map(format_estimate, levels))}.",
        compare_with_paper(
            room,
            "the intervals of a row differ little, pooled over concepts",
            "the intervals of a row differ by more than a little, pooled over concepts",
            f"at most by {format_estimate(spread)}, where {_LITTLE} counts as little; 0.14 in the paper",
        ),
    )
    return " ".join(sentences)


def _negate(interval: MeanInterval) -> MeanInterval:
    return MeanInterval(-interval.mean, -interval.high, -interval.low, interval.concepts)


def _measure_spread(runs: Sequence[RecordedRun]) -> MeanInterval:
    """Return the largest difference of pooled correlations between two intervals of one score."""
    sums = np.array(
        [
            [
                _sum_products(runs, [read_interval(run, name, *interval) for run in runs])
                for interval in INTERVALS.values()
            ]
            for name in SCORES
        ]
    )
    return bootstrap_statistic(sums.shape[2], lambda chosen: float(np.ptp(_pool(sums, chosen), axis=1).max()))
