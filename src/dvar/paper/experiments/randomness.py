"""Figure 5: L_det with one of its five random factors drawn anew at each evaluation, on batches of growing size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dvar.analysis.signal_to_noise import SignalToNoise, information
from dvar.diffusion.objective import Draws
from dvar.paper.extra_runs import ExtraRuns, trained
from dvar.paper.result import ExperimentResult, Plot, Table, compared
from dvar.paper.style import NOISE, SIGNAL, axes
from dvar.stopping.probe import undisturbed
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
"""What is drawn anew, by the paper's letters, and the fields of `Draws` that it is."""
ROWS = (*FACTORS, PAIRED)
SERIES = "factors"
LETTERS = "x: the pictures; y: their captions; E(x): the autoencoder's sample; ε: the noise; t: the timesteps"
_PART = 32
"""Samples in one forward pass; larger batches are accumulated."""
SHOWN = 2500 / 6100
"""Of the cap, what the paper's figure shows and what is trained here."""
_SIZES = {True: (8, 32), False: (8, 32, 128, 512)}
_STEPS, _EVERY = {True: 120, False: None}, {True: 5, False: 10}
Curves = Mapping[str, np.ndarray]


def make(bench: ExtraRuns) -> ExperimentResult:
    """The curves, and in a table what each tells."""
    sizes, every, steps = _SIZES[bench.quick], _EVERY[bench.quick], _STEPS[bench.quick]
    planned = bench.planned("figure5")
    config = replace(
        planned.config,
        output_dir=str(planned.folder),
        max_train_steps=steps or round(planned.config.max_train_steps * SHOWN),
        checkpointing_steps=20,
        probe_every=every,
        window=8 * every,  # of a rule that is not asked
    )
    trace = trained(config, lambda job: redrawn(job, sizes[-1], every), bench.tell)
    at, curves = read(trace)
    stated = (
        f"{bench.stated(planned)} Here {config.max_train_steps} steps were trained, and each curve evaluated every "
        f"{every} of them."
    )
    found = {(row, size): told(at, curves, row, size) for row in ROWS for size in sizes}
    return ExperimentResult(
        "figure5",
        "Figure 5: which randomness hides convergence",
        (_pattern(found, sizes),),
        (_table(found, sizes, stated),),
        (_plot(at, curves, sizes, stated),),
    )


def redrawn(job: TrainingRun, count: int, every: int) -> Series:
    """What is measured: the losses of ``count`` samples with each factor drawn anew, and the frozen model's with t.

    The first samples of the held batch are those of L_det itself, since a draw's key is its sample's number.
    """
    held = replace(job.drawn(job.examples, "held", 0, 0, count), mask=None)
    untouched = job.method.state

    def losses(draws: Draws) -> list[float]:
        parts = [job.losses(_part(draws, first)) for first in range(0, count, _PART)]
        return [float(loss) for loss in torch.cat(parts)]

    def series(step: int, watch: Stopwatch) -> dict[str, Any]:
        if step % every:
            return {}
        with watch(SERIES), undisturbed(job.backbone.modules, job.config.seed), torch.no_grad():
            fresh = job.drawn(job.examples, SERIES, step, 0, count)
            found = {name: losses(_with(held, fresh, names)) for name, names in FACTORS.items()}
            learned = job.method.state
            job.method.load(untouched)
            try:
                found[FROZEN] = losses(_with(held, fresh, FACTORS["t"]))
            finally:
                job.method.load(learned)
        return {SERIES: found}

    return series


def read(trace: Trace) -> tuple[np.ndarray, Curves]:
    """Steps [n] and for each row its losses [n, samples]; the paired one is that with t less the frozen model's."""
    rows = [row for row in trace.records if SERIES in row]
    curves = {name: np.array([row[SERIES][name] for row in rows]) for name in (*FACTORS, FROZEN)}
    return np.array([row["step"] for row in rows]), {**curves, PAIRED: curves["t"] - curves[FROZEN]}


def told(at: np.ndarray, curves: Curves, row: str, size: int) -> SignalToNoise:
    """What a curve tells of the fall that there is: that of L_det on the largest batch, the same for all."""
    there = information(at, curves[HELD].mean(axis=1))
    return replace(information(at, curves[row][:, :size].mean(axis=1)), gain=there.gain)


def _part(draws: Draws, first: int) -> Draws:
    names = ("moments", "vae_noise", "noise", "timesteps", "input_ids")
    return Draws(**{name: getattr(draws, name)[first : first + _PART] for name in names})


def _with(held: Draws, fresh: Draws, names: tuple[str, ...]) -> Draws:
    anew: dict[str, Tensor] = {name: getattr(fresh, name) for name in names}
    return replace(held, **anew)


def _name(row: str) -> str:
    if row == HELD:
        return "nothing (L_det)"
    return "t, less the frozen model's loss" if row == PAIRED else "all of them" if row == "all" else row


def _table(found: Mapping[tuple[str, int], SignalToNoise], sizes: tuple[int, ...], stated: str) -> Table:
    lines = tuple(
        (
            _name(row),
            *(_short(found[row, size].ratio) for size in sizes),
            *(found[row, size].steps_told for size in sizes),
        )
        for row in ROWS
    )
    data = tuple(
        {"drawn anew": row, "batch": size, "fall over jitter": one.ratio, "steps to detect": one.steps_to_detect}
        for (row, size), one in found.items()
    )
    columns = (
        "Drawn anew",
        *(f"Fall / jitter, B = {size}" for size in sizes),
        *(f"Steps to see it, B = {size}" for size in sizes),
    )
    caption = (
        f"{stated} The fall is that of L_det on the largest batch, the same for every row; the jitter is the standard "
        "deviation of a row's first differences over √2. Steps to see it: as many as must be averaged before and after "
        "for the fall to be five standard errors. The last row is not the paper's: timesteps drawn anew, and the "
        "untouched model's loss on the very same draws taken off."
    )
    return Table("informativeness", caption, columns, lines, data)


def _short(ratio: float) -> str:
    return (
        "no fall"
        if not ratio
        else "no jitter"
        if np.isinf(ratio)
        else f"{ratio:.1f}"
        if ratio < 100
        else f"{ratio:.0f}"
    )


def _plot(at: np.ndarray, curves: Curves, sizes: tuple[int, ...], stated: str) -> Plot:
    drawn, panels = axes(len(ROWS), len(sizes), width=2.6 * len(sizes) + 1.4, height=0.95, sharex=True)
    data = []
    for line, row in enumerate(ROWS):
        for column, size in enumerate(sizes):
            panel, values = panels[line][column], curves[row][:, :size].mean(axis=1)
            level = curves[HELD][0, :size].mean()
            shown = 100 * (values / level - (row != PAIRED))
            panel.plot(at, shown, color=SIGNAL if row in (HELD, PAIRED) else NOISE, linewidth=1.0)
            data.append({"drawn anew": row, "batch": size, "step": at, "loss": values})
            panel.set_ylabel({HELD: "nothing", PAIRED: "t, paired"}.get(row, row) if not column else "")
            panel.set_title(f"B = {size}" if not line else "")
    for panel in panels[-1]:
        panel.set_xlabel("step")
    drawn.supylabel("loss, % of the first $L_{det}$, less 100", fontsize=9)
    caption = (
        f"{stated} The loss in percent of L_det's first value, less 100, with what a row names drawn anew at each "
        f"evaluation ({LETTERS}); each panel has a scale of its own. The smaller batches "
        "are the first samples of the largest."
    )
    return Plot("factors", caption, drawn, data)


def _pattern(found: Mapping[tuple[str, int], SignalToNoise], sizes: tuple[int, ...]) -> str:
    single = {row: found[row, sizes[0]].jitter for row in ("x", "y", "E(x)", "ε", "t")}
    worst = max(single, key=lambda row: single[row])
    others = ", ".join(f"{row} {jitter:.2g}" for row, jitter in single.items() if row != "t")
    told = f"jitter {single['t']:.2g} on {sizes[0]} inputs; {others}"
    most = compared(f"timesteps drawn anew hide the fall most ({told})", worst == "t")
    paired, alone = found[PAIRED, sizes[0]], found["t", sizes[0]]
    times = alone.jitter / paired.jitter if paired.jitter else float("inf")
    return f"{most} Taking off the untouched model's loss on the same draws leaves a jitter {times:.0f} times smaller."
