"""Figures 1, 2, 6, 7 and 14: what the training loss, its gradient, CLIP and L_det show of convergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import SignalToNoise, measure_signal_to_noise
from dvar.analysis.stop_quality import MeanInterval, mean_over_concepts
from dvar.paper.result import ExperimentResult, Plot, Provenance, compare_with_paper, method_title
from dvar.paper.style import COLOURS, INK, NOISE, SIGNAL, axes, mark
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import REPORT, Floats, RecordedRun, Steps

BEFORE = 30
"""Steps before a relapse of L_det in which the gradient that caused it is looked for."""
_CLEAR = 3.0
"""Jitters from which a fall shows."""
MORE = 4
"""Concepts of each method in Figure 14."""


def figure_1(archive: RecordingArchive) -> ExperimentResult:
    """Compare the training loss, the gradient and L_det on one concept of Textual Inversion."""
    return _compare_series(archive, "textual-inversion", 1, ("train_loss", "grad_norm", "eval"))


def figure_2(archive: RecordingArchive) -> ExperimentResult:
    """Compare all four series on one concept of Textual Inversion."""
    return _compare_series(archive, "textual-inversion", 1)


def figure_6(archive: RecordingArchive) -> ExperimentResult:
    """Compare all four series on one concept of Custom Diffusion."""
    return _compare_series(archive, "custom-diffusion", 1)


def figure_7(archive: RecordingArchive) -> ExperimentResult:
    """Compare all four series on one concept of DreamBooth-LoRA."""
    return _compare_series(archive, "dreambooth-lora", 1)


def figure_14(archive: RecordingArchive) -> ExperimentResult:
    """Compare all four series on `MORE` concepts of every method."""
    results = [_compare_series(archive, method, MORE) for method in archive.methods]
    return ExperimentResult(
        paragraphs=tuple(line for result in results for line in result.paragraphs),
        plots=tuple(plot for result in results for plot in result.plots),
    )


def measure_relapse(run: RecordedRun) -> float | None:
    """Return how large a gradient came before L_det rose above its first value again, after half of its fall.

    Returns:
        The largest gradient norm of the `BEFORE` steps before, in medians of the run; None where L_det stays below.
    """
    steps, values = _mean_series(run, "eval")
    fallen = int(np.argmax(values <= (values[0] + values.min()) / 2))
    above = np.flatnonzero(values[fallen:] > values[0])
    if not above.size:
        return None
    step = steps[fallen + above[0]]
    gradient_steps, norms = _mean_series(run, "grad_norm")
    return float(norms[(step - BEFORE <= gradient_steps) & (gradient_steps <= step)].max() / np.median(norms))


def _mean_series(run: RecordedRun, name: str) -> tuple[Steps, Floats]:
    steps, values = run.series(name)
    return steps, values.mean(axis=1)


def _clip_image(run: RecordedRun) -> tuple[Steps, Floats]:
    steps, values = run.scores("train", "clip_image", REPORT)
    return steps, values.mean(axis=1)


@dataclass(frozen=True)
class _Series:
    """One panel: the label of its axis, its name in a caption, and where its steps and values come from."""

    label: str
    description: str
    read: Callable[[RecordedRun], tuple[Steps, Floats]]


SERIES = {
    "train_loss": _Series("training loss", "the training loss", lambda run: _mean_series(run, "train_loss")),
    "grad_norm": _Series("gradient norm", "the gradient norm", lambda run: _mean_series(run, "grad_norm")),
    "clip_image": _Series("CLIP image", "Train CLIP image", _clip_image),
    "eval": _Series(r"$L_{det}$", "L_det on the held batch", lambda run: _mean_series(run, "eval")),
}
"""The series in the order of the paper's panels."""


def _compare_series(
    archive: RecordingArchive, method: str, concepts: int, names: Sequence[str] = tuple(SERIES)
) -> ExperimentResult:
    runs = archive.example_runs(method, concepts)
    figure, data = _plot_series(runs, names)
    caption = (
        f"{method_title(method)}. From top to bottom: {', '.join(SERIES[name].description for name in names)}. Dashed: "
        f"where DVAR stops with the paper's preset, scaled in time. {Provenance.of(runs)} Concepts are the first by "
        "name; what is said above is of all recorded runs of the method."
    )
    plot = Plot(f"convergence-{method}", caption, figure, data)
    every = archive.runs_of(method)
    return ExperimentResult((_compare_visibility(every), _compare_relapses(every)), plots=(plot,))


def _plot_series(runs: Sequence[RecordedRun], names: Sequence[str]) -> tuple[Figure, list[dict[str, object]]]:
    """Plot one column for each run and one row for each series."""
    figure, panels = axes(len(names), len(runs), width=max(7.0, 3.2 * len(runs)), height=1.35, sharex="col")
    data: list[dict[str, object]] = []
    for column, run in enumerate(runs):
        stop = strategies.evaluate_strategy(strategies.paper_dvar_strategy(run, scaled=True), run)
        for row, name in enumerate(names):
            panel = panels[row][column]
            steps, values = SERIES[name].read(run)
            colour = SIGNAL if name == "eval" else INK if name == "clip_image" else NOISE
            marker = {"marker": "o", "markersize": 2.5} if name == "clip_image" else {}
            panel.plot(steps, values, color=colour, linewidth=0.7 if colour == NOISE else 1.3, **marker)
            if not stop.censored:
                mark(panel, stop.stop, f"DVAR {stop.stop}" if not row else "", COLOURS[1], (0, (4, 3)))
            if name == "grad_norm":
                panel.set_yscale("log")  # a rare large norm would flatten all others
            panel.set_ylabel(SERIES[name].label if not column else "")
            data.append({"record": run.name, "series": name, "step": steps, "value": values})
        panels[0][column].set_title(run.concept.replace("_", " ") if len(runs) > 1 else "")
        panels[-1][column].set_xlabel("step")
    return figure, data


def _compare_visibility(runs: Sequence[RecordedRun]) -> str:
    """Say whether the training loss hides what L_det shows: the fall of each over its jitter."""
    noisy, fixed = ([_signal(run, name).ratio for run in runs] for name in ("train_loss", "eval"))
    holds = [signal > _CLEAR > noise for signal, noise in zip(fixed, noisy, strict=True)]
    detail = (
        f"in {_count(holds, runs)}; the fall over the jitter, median: {np.median(fixed):.1f} and {np.median(noisy):.2g}"
    )
    return compare_with_paper(
        _majority(runs, holds),
        "in most runs L_det shows the fall and the training loss hides it",
        "in most runs it is not L_det alone that shows the fall",
        detail,
    )


def _compare_relapses(runs: Sequence[RecordedRun]) -> str:
    """Say whether L_det stays low once it has fallen, and if not, how large a gradient came before it rose."""
    relapses = [measure_relapse(run) for run in runs]
    holds = [gradient is None for gradient in relapses]
    detail = f"in {_count(holds, runs)}"
    if gradients := [gradient for gradient in relapses if gradient is not None]:
        low, high = (f"{gradient:,.0f}" for gradient in (min(gradients), max(gradients)))
        norm = f"{low if low == high else f'{low} to {high}'} times the median"
        detail += f"; it rises above it in {len(gradients)}, within {BEFORE} steps of a gradient {norm}"
    condition = "below its first value once half of its fall is done"
    return compare_with_paper(
        _majority(runs, holds),
        f"in most runs L_det stays {condition}",
        f"in most runs L_det does not stay {condition}",
        detail,
    )


def _majority(runs: Sequence[RecordedRun], holds: Sequence[bool]) -> MeanInterval:
    """Return by how much the share of runs in which something holds is above one half."""
    return mean_over_concepts(runs, [held - 0.5 for held in holds])


def _count(holds: Sequence[bool], runs: Sequence[RecordedRun]) -> str:
    return f"{sum(holds)} of {len(runs)} runs of {method_title(runs[0].method)}"


def _signal(run: RecordedRun, name: str) -> SignalToNoise:
    return measure_signal_to_noise(*_mean_series(run, name))
