"""Table 1: what each strategy costs and keeps, and where it stops on each concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from scipy.stats import gaussian_kde

from dvar.analysis import strategies
from dvar.analysis.stop_quality import MeanInterval, bootstrap_mean
from dvar.analysis.strategy_costs import CostRow, best_dvar, cost_rows
from dvar.html.tables import Column
from dvar.paper.published import TABLE_1, PaperRow
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    describe_tuning,
    format_estimate,
    format_mean_sd,
    format_number,
    format_percent,
    method_title,
)
from dvar.paper.style import COLOURS, SOFT, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import IMAGES, Floats, Part

SCORES: tuple[tuple[str, Part, str], ...] = (
    ("Train CLIP img", "train", "clip_image"),
    ("Val CLIP img", "validation", "clip_image"),
    ("Val CLIP txt", "validation", "clip_text"),
    ("Train DINO", "train", "dino"),
    ("Diversity", "validation", "diversity"),
    ("Identity", "train", "identity"),
)
OPTIONAL = ("Train DINO", "Diversity", "Identity")
"""Scores that are shown where they were recorded."""
COSTS = {"Iterations": 1, "Minutes": 2, "Forwards, thousands": 1}
"""What a strategy spends, the less the better, with the digits that are shown; of scores three are shown."""


def table_1(archive: RecordingArchive) -> ExperimentResult:
    """Return what each strategy costs and keeps, the paper's numbers, and a plot of the stops."""
    rows = {method: cost_rows(archive, method) for method in archive.methods}
    provenance = Provenance.of([run for method in archive.methods for run in archive.runs_of(method)])
    return ExperimentResult(
        (*(_compare_method(method, rows[method], archive) for method in archive.methods), *_describe_lost(archive)),
        (_table_of_strategies(archive, rows, provenance), _table_of_paper(archive.methods)),
        (_plot_stops(rows, provenance),),
    )


@dataclass(frozen=True)
class _CostSummary:
    """One line of the table.

    Args:
        method: Name of the method.
        strategy: Name of the strategy.
        concepts: Number of concepts.
        values: Scores and costs by the title of their column, a value for each concept.
        figures: The other numbers by the title of their column.
    """

    method: str
    strategy: str
    concepts: int
    values: Mapping[str, list[float]]
    figures: Mapping[str, float]

    @property
    def heading(self) -> str:
        """Return the heading of the method's lines."""
        return f"{method_title(self.method)} ({self.concepts} concepts)"

    def data(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the numbers of the line, with the moments of the values of ``names``."""
        moments = {
            f"{name} {moment}": float(function(self.values[name]))
            for name in names
            if self.values[name]
            for moment, function in (("mean", np.mean), ("sd", np.std))
        }
        return {"method": self.method, "way": self.strategy, "concepts": self.concepts, **moments, **self.figures}


def _summarise_row(row: CostRow, archive: RecordingArchive, baseline: CostRow) -> _CostSummary:
    seconds = archive.unit_seconds(row.method)
    minutes = row.per_concept([strategies.estimate_minutes(result, seconds) for result in row.results])
    baseline_minutes = float(np.mean([strategies.estimate_minutes(result, seconds) for result in baseline.results]))
    forwards = [
        strategies.count_forward_equivalents(result, run) / 1000
        for run, result in zip(row.runs, row.results, strict=True)
    ]
    scores = {name: row.scores(part, metric) for name, part, metric in SCORES}
    costs = {
        "Iterations": row.per_concept([result.stop for result in row.results]),
        "Minutes": minutes,
        "Forwards, thousands": row.per_concept(forwards),
    }
    figures = {
        "Speed-up": baseline_minutes / float(np.mean(minutes)) if np.mean(minutes) else float("nan"),
        "Start-up, min": float(np.mean([strategies.estimate_start_up(run, seconds) for run in row.runs])),
        "Final pictures, min": IMAGES * seconds.get("picture", float("nan")) / 60,
        "Censored": float(np.mean([result.censored for result in row.results])),
    }
    concepts = len({run.concept for run in row.runs})
    return _CostSummary(row.method, row.strategy, concepts, scores | costs, figures)


def _values_column(name: str) -> Column[_CostSummary]:
    return Column(name, lambda row: row.values[name], partial(format_mean_sd, digits=COSTS.get(name, 3)))


def _columns(names: Sequence[str]) -> list[Column[_CostSummary]]:
    minutes = partial(format_number, digits=2)
    return [
        Column("Strategy", "strategy"),
        *map(_values_column, names),
        Column("Speed-up", lambda row: row.figures["Speed-up"], lambda ratio: f"{format_number(ratio, 1)}×"),
        Column("Start-up, min", lambda row: row.figures["Start-up, min"], minutes),
        Column("Final images, min", lambda row: row.figures["Final pictures, min"], minutes),
        Column("Censored", lambda row: row.figures["Censored"], format_percent),
    ]


def _table_of_strategies(
    archive: RecordingArchive, rows: Mapping[str, Sequence[CostRow]], provenance: Provenance
) -> Table:
    recorded = {
        name
        for name, part, metric in SCORES
        if any(row.scores(part, metric) for group in rows.values() for row in group)
    }
    names = [name for name, *_ in SCORES if name in recorded or name not in OPTIONAL] + list(COSTS)
    summaries, bold = list[_CostSummary](), set[tuple[int, int]]()
    for group in rows.values():
        lines = [_summarise_row(row, archive, group[0]) for row in group]
        for column, name in enumerate(names, start=1):
            means = [float(np.mean(line.values[name])) if line.values[name] else np.nan for line in lines]
            if np.isfinite(means).any():
                best = np.nanargmin(means) if name in COSTS else np.nanargmax(means)
                bold.add((len(summaries) + int(best), column))
        summaries += lines
    if all(group[0].rescored for group in rows.values()):
        provenance = replace(provenance, halves="the even half chooses")
    caption = (
        "Mean ± standard deviation over concepts (seeds averaged first); the best mean of a method is bold. Iterations "
        f"are the steps trained; scores are those of the kept checkpoint, {_describe_scoring(rows)}. Identity, where "
        "shown, is the bundled recogniser's probability that the subject is this one and not another of its class; "
        "Diversity, where shown, is the LPIPS between samples of one prompt. "
        "Minutes are counts times median unit seconds and include a strategy's own probe and the images that it read, "
        "but not start-up (with its class images, where a method has them) and final images, which have columns of "
        "their own. A forward is one sample through the U-Net; minutes and forwards count the same images, with as "
        "many sampling steps as were recorded. Censored runs had not stopped where the recorded run ends, and count "
        f"with that step. {provenance} {describe_tuning(archive)} Deviates from the paper: all strategies are read "
        "from one run, CLIP-s is measured where the run was scored, and DVAR's first evaluation is dropped as in the "
        "paper."
    )
    return build_table(
        "ways",
        caption,
        _columns(names),
        summaries,
        data=[summary.data(names) for summary in summaries],
        heading=lambda row: row.heading,
        bold=bold,
    )


def _describe_scoring(rows: Mapping[str, Sequence[CostRow]]) -> str:
    """Say on which images the checkpoints were scored."""
    rescored = [method_title(method) for method, group in rows.items() if group[0].rescored]
    interpolated = "on the half of its images that chose nothing, interpolated between scored steps"
    if not rescored:
        return interpolated
    fresh = "on new images of as many seeds that chose nothing, the same for all strategies"
    return fresh if len(rescored) == len(rows) else f"{fresh} ({', '.join(rescored)}), else {interpolated}"


PAPER_COLUMNS = (
    Column[PaperRow]("Strategy", "strategy"),
    Column[PaperRow]("Train CLIP img", "train_image"),
    Column[PaperRow]("Val CLIP img", "validation_image"),
    Column[PaperRow]("Val CLIP txt", "validation_text"),
    Column[PaperRow]("Iterations", "iterations"),
    Column[PaperRow]("Minutes", "minutes"),
)


def _table_of_paper(methods: Sequence[str]) -> Table:
    published = {row: method for method in methods for row in TABLE_1.get(method, ())}
    caption = "The paper's Table 1: Stable Diffusion 1.5, 48 concepts, one A100. A dash marks an illegible number."
    return build_table(
        "paper",
        caption,
        PAPER_COLUMNS,
        list(published),
        data=[_data_of_paper(method, row) for row, method in published.items()],
        heading=lambda row: method_title(published[row]),
    )


def _data_of_paper(method: str, row: PaperRow) -> dict[str, str]:
    numbers = {name: text for name, text in vars(row).items() if name != "strategy"}
    return {"method": method, "way": row.strategy, **numbers}


def _plot_stops(rows: Mapping[str, Sequence[CostRow]], provenance: Provenance) -> Plot:
    figure, panels = axes(1, len(rows), width=3.6 * len(rows) + 1.2, height=2.6, sharey=True)
    data = []
    for panel, (method, group) in zip(panels[0], rows.items(), strict=True):
        for place, row in enumerate(group):
            _plot_row(panel, place, row)
            data += [
                {
                    "method": method,
                    "way": row.strategy,
                    "record": run.name,
                    "stop": result.stop,
                    "censored": result.censored,
                }
                for run, result in zip(row.runs, row.results, strict=True)
            ]
        panel.set_title(f"{method_title(method)}, n = {len(group[0].runs)}")
        panel.set_xscale("log")
        _label_steps(panel)
        panel.set_xlabel("step trained to")
        panel.grid(axis="y", visible=False)
    names = list(dict.fromkeys(row.strategy for group in rows.values() for row in group))
    panels[0][0].set_yticks(range(len(names)), names, color=SOFT)
    panels[0][0].invert_yaxis()
    caption = (
        "Where each strategy stopped: the violin is the distribution of the n runs on the logarithmic axis, a dot a "
        "run, the bar the median; a hollow triangle is a run that had not stopped where its recording ends. A strategy "
        f"that stops all runs at one step has no violin. {provenance}"
    )
    return Plot("stops", caption, figure, data)


def _plot_row(panel: Axes, place: int, row: CostRow) -> None:
    """Plot the stops of a strategy around the height ``place``: a violin, and a scattered dot for each run."""
    random, colour = np.random.default_rng(place), COLOURS[place % len(COLOURS)]
    if outline := outline_violin([result.stop for result in row.results]):
        grid, widths = outline
        panel.fill_between(grid, place - widths, place + widths, color=colour, alpha=0.18, linewidth=0)
    for censored, shape in ((False, "o"), (True, ">")):
        steps = [result.stop for result in row.results if result.censored == censored]
        heights = place + random.uniform(-0.22, 0.22, len(steps))
        face = "none" if censored else colour
        panel.scatter(steps, heights, s=16, marker=shape, facecolor=face, edgecolor=colour, alpha=0.8)
    median = float(np.median([result.stop for result in row.results]))
    panel.plot([median, median], [place - 0.32, place + 0.32], color=colour, linewidth=2)


def outline_violin(stops: Sequence[int]) -> tuple[Floats, Floats] | None:
    """Return the steps and half widths of a violin: the density of the logarithms of stops, at most 0.4 wide.

    Returns:
        None where all stops are equal, or fewer than three.
    """
    logarithms = np.log(np.maximum(stops, 1))
    if len(stops) < 3 or not np.ptp(logarithms):
        return None
    density = gaussian_kde(logarithms)
    spread = 2 * float(np.sqrt(density.covariance.item()))
    grid = np.linspace(logarithms.min() - spread, logarithms.max() + spread, 100)
    heights = density(grid)
    return np.exp(grid), 0.4 * heights / heights.max()


def _label_steps(panel: Axes) -> None:
    """Label a logarithmic axis with round steps instead of powers of ten."""
    low, high = panel.get_xlim()
    digits = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [digit * 10**power for power in range(6) for digit in digits if low <= digit * 10**power <= high]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))


def _compare_method(method: str, group: Sequence[CostRow], archive: RecordingArchive) -> str:
    """Say which of the paper's three findings about DVAR and Baseline are found on this method."""
    rows = {row.strategy: row for row in group}
    dvar, unit_seconds = best_dvar(rows), archive.unit_seconds(method)

    def minutes(row: CostRow) -> list[float]:
        return row.per_concept([strategies.estimate_minutes(result, unit_seconds) for result in row.results])

    baseline, ours = rows["Baseline"], rows[dvar]
    saved, time = _compare_values(minutes(baseline), minutes(ours), 2)
    image, images = _compare_values(baseline.scores("train", "clip_image"), ours.scores("train", "clip_image"))
    text, texts = _compare_values(ours.scores("validation", "clip_text"), baseline.scores("validation", "clip_text"))
    sentences = (
        f"{method_title(method)}.",
        compare_with_paper(
            saved, f"{dvar} takes less time than Baseline", f"{dvar} takes more time than Baseline", f"minutes: {time}"
        ),
        compare_with_paper(
            image, "Baseline keeps the higher Train CLIP img", "Baseline keeps the lower Train CLIP img", images
        ),
        compare_with_paper(text, "DVAR keeps the higher Val CLIP txt", "DVAR keeps the lower Val CLIP txt", texts),
    )
    return " ".join(sentences)


def _compare_values(values: Sequence[float], others: Sequence[float], digits: int = 3) -> tuple[MeanInterval, str]:
    """Return the mean difference of values by concept, and it with both means as text."""
    pairs = zip(values, others, strict=True)
    difference = bootstrap_mean([value - other for value, other in pairs])
    means = (format_number(float(np.mean(of or [np.nan])), digits) for of in (values, others))
    return difference, f"{' against '.join(means)}; paired by concept {format_estimate(difference, digits)}"


def _describe_lost(archive: RecordingArchive) -> tuple[str, ...]:
    if not archive.unreadable:
        return ()
    reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(archive.unreadable.items()))
    return (f"Runs that failed or could not be read, and that no row counts: {reasons}.",)
