"""Figure 4: the scores of each method during training, and where each strategy stops on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dvar.analysis.stop_quality import mean_over_concepts, reported_score
from dvar.analysis.strategy_costs import CostRow, cost_rows
from dvar.paper.experiments.cost import SCORES
from dvar.paper.result import ExperimentResult, Plot, Provenance, compare_with_paper, format_estimate, method_title
from dvar.paper.style import COLOURS, INK, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import REPORT, Floats, Part, RecordedRun, Steps


def figure_4(archive: RecordingArchive) -> ExperimentResult:
    """Plot mean scores over concepts with the mean stop of every strategy."""
    figure, data = _plot_scores(archive)
    caption = (
        "Line: mean over concepts and seeds; band: one standard deviation over runs. A dot is a strategy, at the mean "
        "of the steps it keeps and its score in Table 1. "
        f"{Provenance.of([run for method in archive.methods for run in archive.runs_of(method)])}"
    )
    return ExperimentResult(
        tuple(_compare_text_score(method, archive.runs_of(method)) for method in archive.methods),
        plots=(Plot("ways", caption, figure, data),),
    )


def _plot_scores(archive: RecordingArchive) -> tuple[Figure, list[dict[str, object]]]:
    """Plot one column for each method and one row for each score that every run has."""
    scores = [
        (name, part, metric) for name, part, metric in SCORES if all((part, metric) in r.image_scores for r in archive)
    ]
    figure, panels = axes(
        len(scores), len(archive.methods), width=3.3 * len(archive.methods) + 1, height=1.7, sharex="col"
    )
    data: list[dict[str, object]] = []
    for column, method in enumerate(archive.methods):
        for line, (name, part, metric) in enumerate(scores):
            panel = panels[line][column]
            steps, mean, deviation = _mean_curve(archive.runs_of(method), part, metric)
            panel.fill_between(steps, mean - deviation, mean + deviation, color=INK, alpha=0.08, linewidth=0)
            panel.plot(steps, mean, color=INK, linewidth=1.2)
            data.append({"method": method, "score": name, "step": steps, "mean": mean, "sd": deviation})
            for place, row in enumerate(cost_rows(archive, method)):
                _plot_stop(panel, row, part, metric, COLOURS[place % len(COLOURS)])
            panel.set_ylabel(name if not column else "")
        panels[0][column].set_title(method_title(method))
        panels[-1][column].set_xlabel("step")
    handles = {dot.get_label(): dot for row in panels for panel in row for dot in panel.collections[1:]}
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure, data


def _mean_curve(runs: Sequence[RecordedRun], part: Part, metric: str) -> tuple[Steps, Floats, Floats]:
    """Return the scored steps that all runs reach, and mean and standard deviation of the score there."""
    steps = runs[0].scored_steps
    steps = steps[steps <= min(run.cap for run in runs)]
    curves = []
    for run in runs:
        scored, values = run.scores(part, metric, REPORT)
        curves.append(np.interp(steps, scored, values.mean(axis=1)))
    return steps, np.mean(curves, axis=0), np.std(curves, axis=0)


def _plot_stop(panel: Axes, row: CostRow, part: Part, metric: str, colour: str) -> None:
    step = float(np.mean([result.kept_step for result in row.results]))
    height = float(np.mean(row.scores(part, metric)))
    panel.scatter([step], [height], s=34, color=colour, edgecolor="white", linewidth=0.8, zorder=3, label=row.strategy)


def _compare_text_score(method: str, runs: Sequence[RecordedRun]) -> str:
    falls = [
        reported_score(run, 0, "validation", "clip_text") - reported_score(run, run.cap, "validation", "clip_text")
        for run in runs
    ]
    fall = mean_over_concepts(runs, falls)
    sentence = compare_with_paper(
        fall,
        "Validation CLIP text falls in long training",
        "Validation CLIP text rises in long training",
        f"the fall from the first step to the last: {format_estimate(fall, 3)}",
    )
    return f"{method_title(method)}. {sentence}"
