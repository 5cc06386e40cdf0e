"""Figure 8: L_det on held batches of 1, 2, 4 and 8 samples, from the recorded losses of single samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import measure_signal_to_noise
from dvar.analysis.stop_quality import mean_over_concepts
from dvar.html.tables import Column
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    format_estimate,
    format_mean_sd,
    format_percent,
    method_title,
)
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import Floats, RecordedRun, Steps
from dvar.stopping.trace import Trace

SIZES = (1, 2, 4, 8)
SHOWN = 3
"""Concepts in the figure."""


@dataclass(frozen=True)
class BatchSizeSummary:
    """The fall of L_det as batches of one size show it; lists hold a value for each run.

    Args:
        size: Samples in a batch.
        ratios: Median fall of L_det over its jitter.
        stops: Mean step at which DVAR stops; nan where no batch stops.
        octaves: Octaves between the stops of two batches; nan where fewer than two stop.
        never: Share of batches on which DVAR never stops.
    """

    size: int
    ratios: list[float]
    stops: list[float]
    octaves: list[float]
    never: list[float]

    @property
    def data(self) -> dict[str, Any]:
        """Return the means, by name."""
        return {
            "size": self.size,
            "ratio": float(np.mean(self.ratios)),
            "stop": _mean_or_none(self.stops),
            "octaves": _mean_or_none(self.octaves),
            "never": float(np.mean(self.never)),
        }


COLUMNS = (
    Column[BatchSizeSummary]("Samples", "size"),
    Column[BatchSizeSummary]("Fall over jitter", "ratios", partial(format_mean_sd, digits=1)),
    Column[BatchSizeSummary]("DVAR stops at", "stops", partial(format_mean_sd, digits=0)),
    Column[BatchSizeSummary]("Octaves between two stops", "octaves", partial(format_mean_sd, digits=2)),
    Column[BatchSizeSummary]("Never stops", lambda row: np.mean(row.never), format_percent),
)


def figure_8(archive: RecordingArchive) -> ExperimentResult:
    """Plot L_det by batch size on some concepts, and summarise curves and stops over all of them."""
    method = archive.methods[0]
    runs = archive.runs_of(method)
    summaries = [_summarise_size(runs, size) for size in SIZES]
    return ExperimentResult(
        (_compare_stops(runs, summaries),),
        (_table_of_sizes(summaries, method, runs),),
        (_plot_batches(archive.example_runs(method, SHOWN), method),),
    )


def split_batches(run: RecordedRun, size: int) -> list[list[int]]:
    """Return the held samples of ``run`` in batches of ``size``, as their indices."""
    count = run.series("eval")[1].shape[1]
    return [list(range(first, first + size)) for first in range(0, count - size + 1, size)]


def mean_loss(run: RecordedRun, batch: Sequence[int]) -> tuple[Steps, Floats]:
    """Return the steps [n] and L_det [n] on some of the held samples."""
    steps, values = run.series("eval")
    return steps, values[:, list(batch)].mean(axis=1)


def _summarise_size(runs: Sequence[RecordedRun], size: int) -> BatchSizeSummary:
    summary = BatchSizeSummary(size, [], [], [], [])
    for run in runs:
        results = [_evaluate_batch(run, batch) for batch in split_batches(run, size)]
        stops = [stop for _, stop in results if stop is not None]
        summary.ratios.append(float(np.median([ratio for ratio, _ in results])))
        summary.never.append(1 - len(stops) / len(results))
        summary.stops.append(float(np.mean(stops)) if stops else float("nan"))
        summary.octaves.append(measure_spread(stops))
    return summary


def measure_spread(stops: Sequence[int]) -> float:
    """Return the octaves between two stops, as the mean over all pairs; nan for fewer than two.

    The mean over pairs estimates the same number from two batches as from eight, where the range grows with them.
    """
    pairs = list(combinations(np.log2(stops), 2))
    return float(np.mean([abs(first - second) for first, second in pairs])) if pairs else float("nan")


def _mean_or_none(values: Sequence[float]) -> float | None:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def _evaluate_batch(run: RecordedRun, batch: Sequence[int]) -> tuple[float, int | None]:
    """Return the fall of a batch's L_det over its jitter, and the step at which DVAR stops on it."""
    steps, values = mean_loss(run, batch)
    rule, trace = strategies.paper_dvar_strategy(run, scaled=True).rule, Trace()
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        trace.record(step, value)
        if rule(trace).stop:
            return measure_signal_to_noise(steps, values).ratio, step
    return measure_signal_to_noise(steps, values).ratio, None


def _compare_stops(runs: Sequence[RecordedRun], summaries: Sequence[BatchSizeSummary]) -> str:
    """Say whether smaller batches agree less on where to stop, as in Section 4.5 of the paper."""
    several = [row for row in summaries if np.isfinite(row.octaves).any()]
    if len(several) < 2:
        return "Too few batches stopped to say how far apart their stops are."
    smallest, largest = several[0], several[-1]
    difference = mean_over_concepts(runs, np.subtract(smallest.octaves, largest.octaves).tolist())
    means = (f"{np.nanmean(row.octaves):.2f} for {_count_samples(row.size)}" for row in (smallest, largest))
    return compare_with_paper(
        difference,
        "stops are further apart on smaller batches",
        "stops are closer together on smaller batches",
        f"octaves between two stops: {', '.join(means)}; paired by concept {format_estimate(difference)}",
    )


def _count_samples(size: int) -> str:
    return f"{size} sample{'s' * (size > 1)}"


def _table_of_sizes(summaries: Sequence[BatchSizeSummary], method: str, runs: Sequence[RecordedRun]) -> Table:
    caption = (
        f"{method_title(method)}, mean ± standard deviation over {len(runs)} recorded runs. Stops are those of the "
        "paper's preset, scaled in time. Octaves, factors of two, are between the stops on two batches of one size, "
        "as the mean over all pairs: that does not grow with the number of batches, as a range would. Of 8 samples "
        f"there is one batch. {Provenance.of(runs)}"
    )
    return build_table("sizes", caption, COLUMNS, summaries, data=[summary.data for summary in summaries])


def _plot_batches(runs: Sequence[RecordedRun], method: str) -> Plot:
    figure, panels = axes(len(SIZES), len(runs), width=3.2 * len(runs) + 0.8, height=1.25, sharex="col")
    data = []
    for column, run in enumerate(runs):
        for row, size in enumerate(SIZES):
            panel = panels[row][column]
            for batch, colour in zip(split_batches(run, size), COLOURS, strict=False):
                steps, values = mean_loss(run, batch)
                panel.plot(steps, 100 * (values / values[0] - 1), color=colour, linewidth=0.9)
                data.append({"record": run.name, "size": size, "samples": batch, "step": steps, "value": values})
            panel.set_ylabel(f"B = {size}, %" if not column else "")
        panels[0][column].set_title(run.concept.replace("_", " "))
        panels[-1][column].set_xlabel("step")
    caption = (
        f"{method_title(method)}: change of L_det since the first step, in percent, on batches of each size; a line is "
        "a batch, and the 8 recorded draws make 8, 4, 2 and 1 of them. Each panel has its own scale. "
        f"{Provenance.of(runs)} Deviates from the paper: the batches are parts of the same 8 draws."
    )
    return Plot("batches", caption, figure, data)
