"""Figure 5: L_det with one of its five random factors drawn again at each evaluation, on batches of growing size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvar.analysis.signal_to_noise import SignalToNoise, measure_signal_to_noise
from dvar.analysis.stop_quality import bootstrap_mean
from dvar.diffusion.objective import Draws
from dvar.html.tables import Column
from dvar.paper.extra_runs import ExtraRuns, train_to_cap
from dvar.paper.result import ExperimentResult, Plot, Table, build_table, compare_with_paper
from dvar.paper.style import NOISE, SIGNAL, axes
from dvar.recordings.recorded_run import Floats, Steps
from dvar.stopping.probe import preserve_state
from dvar.stopping.trace import Trace
from dvar.training.loop import Series, Stopwatch
from dvar.training.run import TrainingRun

HELD, FROZEN, PAIRED = "none", "t, frozen", "t, paired"
FACTORS: Mapping[str, tuple[str, ...]] = {
    HELD: (),
    "x": ("moments",),
    "y": ("input_ids",),
    "E(x)": ("vae_noise",),
    "ε": ("noise",),
    "t": ("timesteps",),
    "all": ("moments", "input_ids", "vae_noise", "noise", "timesteps"),
}
"""What is drawn again, by the paper's letters, and the fields of `Draws` that hold it."""
ROWS = (*FACTORS, PAIRED)
TITLES = {HELD: "nothing (L_det)", PAIRED: "t, less the frozen model's loss", "all": "all of them"}
LABELS = {HELD: "nothing", PAIRED: "t, paired"}
"""Names of rows in the table and in the figure; the others go by their letter."""
SERIES = "factors"
LETTERS = "x: the images; y: their captions; E(x): the autoencoder's sample; ε: the noise; t: the timesteps"
_PART = 32
"""Samples in one forward pass; larger batches are accumulated."""
SHOWN = 2500 / 6100
"""The share of the cap that the paper's figure shows, and that is trained here."""
_SIZES = {True: (8, 32), False: (8, 32, 128, 512)}
_STEPS, _EVERY = {True: 120, False: None}, {True: 5, False: 10}
Curves = Mapping[str, Floats]
"""Losses [steps, samples] of each row."""
Signals = Mapping[tuple[str, int], SignalToNoise]
"""By row and batch size."""


def figure_5(extra_runs: ExtraRuns) -> ExperimentResult:
    """Train a run, plot its loss with each factor drawn again, and summarise what each curve shows."""
    sizes, every, steps = _SIZES[extra_runs.quick], _EVERY[extra_runs.quick], _STEPS[extra_runs.quick]
    spec = extra_runs.recording_spec("figure5")
    config = replace(
        spec.config,
        output_dir=str(spec.folder),
        max_train_steps=steps or round(spec.config.max_train_steps * SHOWN),
        checkpointing_steps=20,
        probe_every=every,
        window=8 * every,  # of a rule that is not evaluated
    )
    trace = train_to_cap(config, lambda run: measure_factors(run, sizes[-1], every), extra_runs.notify)
    at, curves = read_factors(trace)
    description = (
        f"{extra_runs.describe(spec)} {config.max_train_steps} steps were trained, and each curve was evaluated every "
        f"{every} of them."
    )
    signals = {(row, size): compute_signal(at, curves, row, size) for row in ROWS for size in sizes}
    return ExperimentResult(
        (_compare_factors(signals, sizes[0]),),
        (_table_of_factors(signals, sizes, description),),
        (_plot_curves(at, curves, sizes, description),),
    )


def measure_factors(run: TrainingRun, count: int, every: int) -> Series:
    """Return what is measured: the losses with each factor drawn again, and the frozen model's with new timesteps.

    The first samples of the held batch are those of L_det itself, since a draw's key is the index of its sample.

    Args:
        run: A run whose model is untouched.
        count: Samples of the held batch.
        every: Steps between measurements.
    """
    held = replace(run.draw(run.examples, "held", 0, 0, count), mask=None)
    untouched = run.method.state

    def losses(draws: Draws) -> list[float]:
        parts = [run.losses(_slice_draws(draws, first)) for first in range(0, count, _PART)]
        return [float(loss) for loss in torch.cat(parts)]

    def series(step: int, watch: Stopwatch) -> dict[str, Any]:
        if step % every:
            return {}
        with watch(SERIES), preserve_state(run.backbone.modules, run.config.seed), torch.no_grad():
            fresh = run.draw(run.examples, SERIES, step, 0, count)
            values = {name: losses(mix_draws(held, fresh, fields)) for name, fields in FACTORS.items()}
            learned = run.method.state
            run.method.load(untouched)
            try:
                values[FROZEN] = losses(mix_draws(held, fresh, FACTORS["t"]))
            finally:
                run.method.load(learned)
        return {SERIES: values}

    return series


def mix_draws(held: Draws, fresh: Draws, fields: Sequence[str]) -> Draws:
    """Return the held draws with some fields of the fresh ones."""
    replaced: dict[str, Tensor] = {name: getattr(fresh, name) for name in fields}
    return replace(held, **replaced)


def read_factors(trace: Trace) -> tuple[Steps, Curves]:
    """Return the steps [n] and the losses [n, samples] of each row; "t, paired" is "t" less the frozen model's."""
    records = [record for record in trace.records if SERIES in record]
    curves = {name: np.array([record[SERIES][name] for record in records]) for name in (*FACTORS, FROZEN)}
    return np.array([record["step"] for record in records]), {**curves, PAIRED: curves["t"] - curves[FROZEN]}


def compute_signal(at: Steps, curves: Curves, row: str, size: int) -> SignalToNoise:
    """Return the jitter of a curve against the fall of L_det on the largest batch, which is the same for all rows."""
    fall = measure_signal_to_noise(at, curves[HELD].mean(axis=1))
    return replace(measure_signal_to_noise(at, curves[row][:, :size].mean(axis=1)), gain=fall.gain)


def _slice_draws(draws: Draws, first: int) -> Draws:
    names = ("moments", "vae_noise", "noise", "timesteps", "input_ids")
    return Draws(**{name: getattr(draws, name)[first : first + _PART] for name in names})


def _table_of_factors(signals: Signals, sizes: Sequence[int], description: str) -> Table:
    def ratio_column(size: int) -> Column[str]:
        return Column(f"Fall / jitter, B = {size}", lambda row: signals[row, size].ratio, _format_ratio)

    def steps_column(size: int) -> Column[str]:
        return Column(f"Steps to see it, B = {size}", lambda row: signals[row, size].steps_label)

    title = Column[str]("Drawn again", lambda row: TITLES.get(row, row))
    columns = (title, *map(ratio_column, sizes), *map(steps_column, sizes))
    data = [
        {"drawn anew": row, "batch": size, "fall over jitter": signal.ratio, "steps to detect": signal.steps_to_detect}
        for (row, size), signal in signals.items()
    ]
    caption = (
        f"{description} The fall is that of L_det on the largest batch, the same for every row; the jitter is the "
        "standard deviation of a row's first differences over √2. Steps to see it: how many must be averaged before "
        "and after for the fall to be five standard errors. The last row is not in the paper: timesteps are drawn "
        "again, and the untouched model's loss on the same draws is subtracted."
    )
    return build_table("informativeness", caption, columns, ROWS, data=data)


def _format_ratio(ratio: float) -> str:
    if not ratio:
        return "no fall"
    if np.isinf(ratio):
        return "no jitter"
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def _plot_curves(at: Steps, curves: Curves, sizes: Sequence[int], description: str) -> Plot:
    figure, panels = axes(len(ROWS), len(sizes), width=2.6 * len(sizes) + 1.4, height=0.95, sharex=True)
    data = []
    for line, row in enumerate(ROWS):
        for column, size in enumerate(sizes):
            panel, values = panels[line][column], curves[row][:, :size].mean(axis=1)
            level = curves[HELD][0, :size].mean()
            change = 100 * (values / level - (row != PAIRED))
            panel.plot(at, change, color=SIGNAL if row in (HELD, PAIRED) else NOISE, linewidth=1.0)
            data.append({"drawn anew": row, "batch": size, "step": at, "loss": values})
            panel.set_ylabel(LABELS.get(row, row) if not column else "")
            panel.set_title(f"B = {size}" if not line else "")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    figure.supylabel("loss, % of the first $L_{det}$, less 100", fontsize=9)
    caption = (
        f"{description} The loss in percent of L_det's first value, less 100, with what a row names drawn again at "
        f"each evaluation ({LETTERS}); each panel has its own scale. The smaller batches are the first samples of the "
        "largest."
    )
    return Plot("factors", caption, figure, data)


def _compare_factors(signals: Signals, size: int) -> str:
    jitters = {row: signals[row, size].jitter for row in ("x", "y", "E(x)", "ε", "t")}
    others = {row: jitter for row, jitter in jitters.items() if row != "t"}
    listed = ", ".join(f"{row} {jitter:.2g}" for row, jitter in others.items())
    most = compare_with_paper(
        bootstrap_mean([jitters["t"] - max(others.values())]),  # one concept was trained
        "drawing timesteps again hides the fall most",
        "drawing timesteps again does not hide the fall most",
        f"jitter {jitters['t']:.2g} on {size} samples; {listed}",
    )
    paired = signals[PAIRED, size].jitter
    times = jitters["t"] / paired if paired else float("inf")
    return (
        f"{most} Subtracting the untouched model's loss on the same draws makes the jitter {times:.0f} times smaller."
    )
