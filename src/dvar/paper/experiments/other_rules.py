"""Figure 11: what the rules that the paper tried besides DVAR measure during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.analysis import strategies
from dvar.analysis.stop_quality import LearningCurve, MeanInterval, bootstrap_statistic, weakest
from dvar.html.tables import Column
from dvar.paper.result import (
    ExperimentResult,
    Plot,
    Provenance,
    Table,
    build_table,
    compare_with_paper,
    format_estimate,
    format_number,
    method_title,
)
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import Floats, RecordedRun, Steps
from dvar.stopping.rules import Dvar, EmaPercentile, Hall, Rule, Trend
from dvar.stopping.trace import RELATIVE_LOSS, Trace

SHOWN = 5
"""Concepts in the figure."""
_NEVER_MET = 1e-12
"""A threshold under which no rule stops."""


@dataclass(frozen=True)
class Measure:
    """The number that a rule compares with its threshold.

    Args:
        metric: Its name in a verdict.
        rule: From a window to the rule, with a threshold that is never met.
        log: Whether it is plotted on a logarithmic scale.
    """

    metric: str
    rule: Callable[[int], Rule]
    log: bool = False


MEASURES: Mapping[str, Measure] = {
    "EMA percentile": Measure("change", lambda window: EmaPercentile(window, _NEVER_MET)),
    "Hall": Measure("range", lambda window: Hall(window, _NEVER_MET), log=True),
    "Trend": Measure("slope", lambda window: Trend(window, _NEVER_MET, metric=RELATIVE_LOSS)),
    "DVAR": Measure("ratio", lambda window: Dvar(window, _NEVER_MET, strict_paper=True), log=True),
}

Level = Mapping[str, Any]
"""How large a measure is at the oracle: "measure", "median", "low" and "high" percentiles, number of "concepts"."""
COLUMNS = (
    Column[Level]("Measure", itemgetter("measure")),
    Column[Level]("Median", itemgetter("median"), "{:.2g}".format),
    Column[Level]("10–90 %", lambda row: f"{row['low']:.2g} … {row['high']:.2g}"),
    Column[Level]("Ratio", lambda row: row["high"] / row["low"], lambda ratio: format_number(ratio, 1)),
)


def figure_11(archive: RecordingArchive) -> ExperimentResult:
    """Plot each measure on some concepts, and compare how much its level at the oracle differs between concepts."""
    method = archive.methods[0]
    runs = archive.example_runs(method, len(archive))
    window = strategies.paper_window(runs[0], scaled=True)
    curves = {
        name: [read_measure(run, measure.rule(window), measure.metric) for run in runs]
        for name, measure in MEASURES.items()
    }
    sizes = {
        name: np.array([_size_at_oracle(run, *curve) for run, curve in zip(runs, curves[name], strict=True)])
        for name in MEASURES
    }
    levels = [_level_at_oracle(name, of_measure) for name, of_measure in sizes.items()]
    provenance = Provenance.of(runs)
    return ExperimentResult(
        (_compare_levels(sizes),),
        (_table_of_levels(levels, method, provenance),),
        (_plot_measures(runs, curves, window, method, provenance),),
    )


def read_measure(run: RecordedRun, rule: Rule, metric: str) -> tuple[Steps, Floats]:
    """Return the steps [n] and the values [n] of what ``rule`` measures, from the first full window on."""
    trace, steps, values = Trace(), [], []
    for step, losses in zip(*run.series("eval"), strict=True):
        trace.record(int(step), losses)
        metrics = rule(trace).metrics
        if metric in metrics and metrics.get("seen", 0) >= metrics["window"]:
            steps.append(int(step))
            values.append(metrics[metric])
    return np.array(steps), np.array(values)


def _level_at_oracle(name: str, sizes: Floats) -> Level:
    sizes = sizes[_positive(sizes)]
    low, median, high = np.percentile(sizes, (10, 50, 90)) if sizes.size else (np.nan,) * 3
    return {"measure": name, "median": median, "low": low, "high": high, "concepts": int(sizes.size)}


def _size_at_oracle(run: RecordedRun, steps: Steps, values: Floats) -> float:
    learning_curve = LearningCurve.of_run(run)
    if not learning_curve.learned or not len(steps):
        return float("nan")
    return float(np.abs(np.interp(max(learning_curve.step_at(), steps[0]), steps, values)))


def _positive(sizes: Floats) -> NDArray[np.bool_]:
    """Return which sizes are known and have a logarithm."""
    positive: NDArray[np.bool_] = np.isfinite(sizes) & (sizes > 0)
    return positive


def _octaves(sizes: Floats) -> float:
    """Return the octaves between the 10th and the 90th percentile."""
    low, high = np.percentile(sizes, (10, 90))
    return float(np.log2(high / low))


def _compare_levels(sizes: Mapping[str, Floats]) -> str:
    """Say whether one threshold of DVAR suits all concepts better than one of another rule, as in Appendix E.

    Args:
        sizes: By measure, its size at the oracle of each concept.
    """
    finite = np.logical_and.reduce([_positive(of_measure) for of_measure in sizes.values()])
    common = {name: of_measure[finite] for name, of_measure in sizes.items()}
    if finite.sum() < 2:
        return "Too few concepts learned enough to say whether one threshold suits them all."

    def spread_beyond_dvar(name: str) -> MeanInterval:
        return bootstrap_statistic(
            int(finite.sum()), lambda chosen: _octaves(common[name][chosen]) - _octaves(common["DVAR"][chosen])
        )

    others = {name: spread_beyond_dvar(name) for name in common if name != "DVAR"}
    listed = "; ".join(f"{name} by {format_estimate(spread)} more" for name, spread in others.items())
    return compare_with_paper(
        weakest(list(others.values())),
        "what DVAR measures at the oracle differs least between concepts",
        "what another rule measures at the oracle differs less between concepts than what DVAR measures",
        f"octaves from the 10th to the 90th percentile: DVAR {_octaves(common['DVAR']):.1f}; {listed}",
    )


def _table_of_levels(levels: Sequence[Level], method: str, provenance: Provenance) -> Table:
    caption = (
        f"{method_title(method)}: the size of each measure where 90 % of the gain is reached (or as soon after as the "
        "window is full). Ratio: the 90th over the 10th percentile over concepts; the larger it is, the less one "
        f"threshold suits all concepts. {provenance}"
    )
    return build_table("levels", caption, COLUMNS, levels, data=levels)


def _plot_measures(
    runs: Sequence[RecordedRun],
    curves: Mapping[str, Sequence[tuple[Steps, Floats]]],
    window: int,
    method: str,
    provenance: Provenance,
) -> Plot:
    figure, panels = axes(len(MEASURES), 1, width=7.5, height=1.45, sharex="col")
    data: list[dict[str, Any]] = []
    for (name, measure), panel in zip(MEASURES.items(), panels[:, 0], strict=True):
        for run, (steps, values), colour in zip(runs[:SHOWN], curves[name], COLOURS, strict=False):
            panel.plot(steps, values, color=colour, linewidth=1, label=run.concept.replace("_", " "))
            data.append({"record": run.name, "measure": name, "step": steps, "value": values})
        panel.set_ylabel(name)
        if measure.log:
            panel.set_yscale("log")
        else:
            panel.ticklabel_format(axis="y", scilimits=(-2, 2))
    panels[-1, 0].set_xlabel("step")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=SHOWN)
    caption = (
        f"{method_title(method)}: the number that each rule compares with its threshold, over the last {window} steps, "
        f"on {min(SHOWN, len(runs))} concepts; Trend is a share of the first loss per step. {provenance} The "
        "paper does not state its window; this is DVAR's preset, scaled in time."
    )
    return Plot("measures", caption, figure, data)
