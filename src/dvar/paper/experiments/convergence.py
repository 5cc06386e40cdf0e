"""Figures 1, 2, 6, 7 and 14: what the training loss, its gradient, CLIP and L_det show of convergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import SignalToNoise, measure_signal_to_noise
from dvar.paper.result import ExperimentResult, Plot, Provenance, compare_with_paper, method_title
from dvar.paper.style import COLOURS, INK, NOISE, SIGNAL, axes, mark
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import REPORT, Floats, RecordedRun, Steps

BEFORE = 30
"""Steps before a relapse of L_det in which the gradient that caused it is looked for."""
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
        "name."
    )
    plot = Plot(f"convergence-{method}", caption, figure, data)
    return ExperimentResult((_compare_visibility(runs), _describe_relapses(runs)), plots=(plot,))


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
    ratios = {name: [_signal(run, name).ratio for run in runs] for name in ("train_loss", "eval")}
    noisy, fixed = (float(np.median(ratios[name])) for name in ("train_loss", "eval"))
    sample = f"{method_title(runs[0].method)}, median of {len(runs)}"
    return compare_with_paper(
        fixed > 3 > noisy,
        f"L_det shows the fall ({fixed:.1f} times its jitter) and the training loss hides it ({noisy:.2g} times; "
        f"{sample})",
        f"it is not the case that L_det shows the fall ({fixed:.1f} times its jitter) while the training loss hides it "
        f"({noisy:.2g} times; {sample})",
    )


def _describe_relapses(runs: Sequence[RecordedRun]) -> str:
    """Say whether L_det stays low once it has fallen, and if not, how large a gradient came before it rose."""
    gradients = [gradient for run in runs if (gradient := measure_relapse(run)) is not None]
    subject, condition = (
        f"L_det of {method_title(runs[0].method)}",
        "below its first value once half of its fall is done",
    )
    claim = f"{subject} stays {condition}"
    if not gradients:
        return compare_with_paper(True, claim, "")
    low, high = (f"{gradient:,.0f}" for gradient in (min(gradients), max(gradients)))
    norm = f"{low if low == high else f'{low} to {high}'} times the median"
    detail = f"it rises again in {len(gradients)} of {len(runs)}, within {BEFORE} steps of a gradient {norm}"
    return compare_with_paper(False, claim, f"{subject} does not always stay {condition} ({detail})")


def _signal(run: RecordedRun, name: str) -> SignalToNoise:
    return measure_signal_to_noise(*_mean_series(run, name))
