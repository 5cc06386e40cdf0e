"""The charts and image grids of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from dvar.html import svg_charts
from dvar.html.svg_charts import Scale
from dvar.runs.replay_figure import layer_ratios, layer_shares
from dvar.runs.run_folder import Floats, RunFolder

MAX_COLUMNS, MAX_ROWS = 6, 8  # of the grid of sample images
MAX_NON_FINITE_MARKS = 20


class HeldInput(NamedTuple):
    """The chart of one input of the held batch.

    Attributes:
        name: Its timestep, for people.
        change: Relative change of its loss from the first step to the last.
        chart: Its loss over the steps, as SVG.
    """

    name: str
    change: str
    chart: Markup


class SampleRow(NamedTuple):
    """The sample images of one prompt and seed over training.

    Attributes:
        prompt: The prompt.
        images: One image for each step shown; None where it is missing.
    """

    prompt: str
    images: list[Path | None]


def plot_training_loss(run: RunFolder) -> Markup:
    """Return a chart of the training loss with the window and the stop, as SVG."""
    x, (steps, losses) = _step_scale(run), run.trace.metric("train_loss")
    y = Scale.around(losses)
    layers = [*_mark_verdict(run, x), svg_charts.curve(x, y, steps, losses, "noise")]
    return svg_charts.panel(x, y, layers, label="Training loss", steps=False)


def plot_fixed_loss(run: RunFolder) -> Markup:
    """Return a chart of L_det with its minimum, the window and the stop, as SVG."""
    x, y = _step_scale(run), Scale.around(run.trace.values, room=0.16)
    layers = [*_mark_verdict(run, x, "stop"), svg_charts.curve(x, y, run.trace.steps, run.trace.values, "signal")]
    if run.best:
        layers.append(svg_charts.dot(x, y, *run.best, "best", f"lowest {run.best[0]}"))
    return svg_charts.panel(x, y, layers, label="L_det", steps=True)


def plot_ratio(run: RunFolder) -> Markup:
    """Return a chart of the ratio that the rule compares with its threshold, as SVG; DVAR's with a straight line's."""
    x = _step_scale(run)
    stops = _mark_stop(run, x, "stop")
    if not run.takes_window:
        y, layers = layer_shares(x, run.trace, run.ratios, run.ready_step, stops)
        return svg_charts.panel(x, y, layers, label="Share of the last doubling", steps=True, tall=True)
    y, layers = layer_ratios(x, run.trace, run.ratios, run.config["window"], run.config["threshold"], stops)
    return svg_charts.panel(x, y, layers, label="Ratio of the variances", steps=True, tall=True)


def plot_held_inputs(run: RunFolder) -> list[HeldInput]:
    """Return a small chart of each held input on its own scale, ordered by timestep; none without records."""
    samples = run.trace.samples
    if not samples.size:
        return []
    timesteps = run.trace.header.get("timesteps") or [None] * samples.shape[1]
    order = sorted(range(samples.shape[1]), key=lambda index: (timesteps[index] or 0, index))
    return [_plot_held_input(run, samples[:, index], timesteps[index]) for index in order]


def select_sample_steps(run: RunFolder) -> list[int]:
    """Return the steps whose samples are shown: the first, the last and some evenly between."""
    steps = sorted(run.samples)
    if len(steps) <= MAX_COLUMNS:
        return steps
    return [steps[int(index)] for index in np.rint(np.linspace(0, len(steps) - 1, MAX_COLUMNS))]


def arrange_samples(run: RunFolder, steps: Sequence[int]) -> list[SampleRow]:
    """Return the sample images of ``steps``, a row for each prompt and seed."""
    count = min(MAX_ROWS, max((len(images) for images in run.samples.values()), default=0))
    columns = [run.samples[step] for step in steps]
    return [
        SampleRow(
            str(run.prompts[row]["prompt"]) if row < len(run.prompts) else "samples",
            [images[row] if row < len(images) else None for images in columns],
        )
        for row in range(count)
    ]


def _step_scale(run: RunFolder) -> Scale:
    return Scale(0.0, max(run.steps, 1) * 1.03)


def _mark_verdict(run: RunFolder, x: Scale, name: str | None = None) -> list[Markup]:
    """Mark the window behind a stop, the steps with a loss that is not finite, and the stop."""
    step = run.verdict.step
    window = [svg_charts.band(x, step - run.window_at(step), step, "window")] if run.stopped_by_condition else []
    marks = [svg_charts.upright(x, step, "lost") for step in run.non_finite_steps[:MAX_NON_FINITE_MARKS]]
    return [*window, *marks, *_mark_stop(run, x, name)]


def _mark_stop(run: RunFolder, x: Scale, name: str | None) -> list[Markup]:
    step = run.verdict.step
    return [svg_charts.upright(x, step, "stop", f"{name} {step}" if name else None)] if run.verdict.stop else []


def _plot_held_input(run: RunFolder, losses: Floats, timestep: int | None) -> HeldInput:
    x, y = _step_scale(run), Scale.around(losses)
    finite = losses[np.isfinite(losses)]
    change = f"{100 * (finite[-1] / finite[0] - 1):+.2g} %".replace("-", "−") if finite.size and finite[0] else ""
    name = "unknown timestep" if timestep is None else f"t = {timestep}"
    line = svg_charts.curve(x, y, run.trace.steps, losses, "signal")
    return HeldInput(name, change, svg_charts.spark([line], label=f"Loss at {name} by step"))
