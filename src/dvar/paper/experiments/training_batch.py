"""Figure 9: the training loss and the gradient's norm on training batches of growing size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from dvar.analysis.signal_to_noise import SignalToNoise, information
from dvar.paper.extra_runs import ExtraRuns, trained
from dvar.paper.result import ExperimentResult, Plot, Table, compared, number
from dvar.paper.style import NOISE, SIGNAL, axes
from dvar.stopping.trace import Trace

SIZES = {True: (4, 16, 64), False: (4, 16, 64, 128)}
STEPS = {True: 24, False: 200}
"""By whether the runs are to be small.  Of every size the same number of steps is trained."""


def make(bench: ExtraRuns) -> ExperimentResult:
    """The curves, and in a table what each tells."""
    sizes, steps = SIZES[bench.quick], STEPS[bench.quick]
    traces: dict[int, Trace] = {}
    for size in sizes:
        bench.tell(f"batches of {size}")
        planned = bench.planned(f"figure9/batch-{size}")
        each = planned.config.train_batch_size
        config = replace(
            planned.config,
            output_dir=str(planned.folder),
            max_train_steps=steps,
            gradient_accumulation_steps=max(1, size // each),
            checkpointing_steps=10,
            window=8,  # of a rule that is not asked
        )
        traces[size] = trained(config, lambda job: lambda step, watch: {}, bench.tell)
    stated = (
        f"{bench.stated(planned)} Batches of {_list(sizes)}, accumulated {each} at a time; {steps} updates each, at "
        "one learning rate."
    )
    told = {size: _told(trace) for size, trace in traces.items()}
    return ExperimentResult(
        "figure9",
        "Figure 9: larger training batches",
        (_pattern(told),),
        (_table(told, steps, stated),),
        (_plot(traces, stated),),
    )


def _told(trace: Trace) -> tuple[SignalToNoise, float, float]:
    """What the training loss tells of the fall of L_det, and the gradient's norm at the beginning and at the end."""
    fall = information(trace.steps, trace.values).gain
    norms = trace.metric("grad_norm")[1]
    fifth = max(1, len(norms) // 5)
    first, last = (float(np.median(part)) for part in (norms[:fifth], norms[-fifth:]))
    return replace(information(*trace.metric("train_loss")), gain=fall), first, last


def _table(told: Mapping[int, tuple[SignalToNoise, float, float]], steps: int, stated: str) -> Table:
    lines, data = [], []
    for size, (noisy, first, last) in told.items():
        lines.append(
            (
                f"{size}",
                f"{size * steps}",
                f"{noisy.jitter:.2g}",
                number(noisy.ratio, 2),
                noisy.steps_told,
                f"{first:.2g}",
                f"{last:.2g}",
            )
        )
        data.append(
            {
                "batch": size,
                "samples": size * steps,
                "jitter": noisy.jitter,
                "fall over jitter": noisy.ratio,
                "steps to detect": noisy.steps_to_detect,
                "gradient norm, first fifth": first,
                "gradient norm, last fifth": last,
            }
        )
    columns = (
        "Batch",
        "Samples trained",
        "Jitter of the training loss",
        "Fall of L_det / jitter",
        "Steps to see it",
        "Gradient norm, first fifth",
        "Gradient norm, last fifth",
    )
    caption = (
        f"{stated} The fall is that of L_det in the same run; the jitter is the standard deviation of the training "
        "loss's first differences over √2. Steps to see it: as many as must be averaged before and after for the fall "
        "to be five standard errors. Gradient norms are medians."
    )
    return Table("batches", caption, columns, tuple(lines), tuple(data))


def _plot(traces: Mapping[int, Trace], stated: str) -> Plot:
    drawn, panels = axes(3, len(traces), width=2.4 * len(traces) + 1.2, height=1.25, sharex=True, sharey="row")
    data = []
    for column, (size, trace) in enumerate(traces.items()):
        curves = {
            "training loss": trace.metric("train_loss"),
            "gradient norm": trace.metric("grad_norm"),
            r"$L_{det}$": (trace.steps, trace.values),
        }
        for row, (name, (steps, values)) in enumerate(curves.items()):
            panel = panels[row][column]
            panel.plot(steps, values, color=SIGNAL if row == 2 else NOISE, linewidth=1.3 if row == 2 else 0.8)
            panel.set_ylabel(name if not column else "")
            data.append({"batch": size, "series": name.strip("$"), "step": steps, "value": values})
        panels[1][column].set_yscale("log")
        panels[0][column].set_title(f"B = {size}")
        panels[-1][column].set_xlabel("step")
    caption = (
        f"{stated} Below, for comparison, L_det of each run on its 8 held inputs. Deviates from the paper: the "
        f"smallest batch is {min(traces)} and not 2, and the steps are fewer, as the whole training here is shorter."
    )
    return Plot("batches", caption, drawn, data)


def _pattern(told: Mapping[int, tuple[SignalToNoise, float, float]]) -> str:
    largest = max(told)
    noisy, first, last = told[largest]
    hidden = f"the training loss still hides the fall with batches of {largest} ({noisy.ratio:.2g} times its jitter)"
    falls = f"the gradient's norm falls with them ({first:.2g} at first, {last:.2g} at the end)"
    return f"{compared(hidden, noisy.ratio < 3)} {compared(falls, last < first)}"


def _list(sizes: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
