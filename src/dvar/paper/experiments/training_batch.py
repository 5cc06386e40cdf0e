"""Figure 9: the training loss and the gradient norm on training batches of growing size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from dvar.analysis.signal_to_noise import SignalToNoise, measure_signal_to_noise
from dvar.analysis.stop_quality import bootstrap_mean
from dvar.html.tables import Column
from dvar.paper.extra_runs import ExtraRuns, train_to_cap
from dvar.paper.result import ExperimentResult, Plot, Table, build_table, compare_with_paper, format_number
from dvar.paper.style import NOISE, SIGNAL, axes
from dvar.stopping.trace import Trace

SIZES = {True: (4, 16, 64), False: (4, 16, 64, 128)}
STEPS = {True: 24, False: 200}
"""By whether the runs are small. Every size is trained for the same number of steps."""


@dataclass(frozen=True)
class BatchSummary:
    """The measurements of a run with one batch size.

    Args:
        size: Samples in a batch.
        samples: Samples trained on.
        signal: The fall of L_det against the jitter of the training loss.
        first_norm: Median gradient norm of the first fifth of the steps.
        last_norm: Median gradient norm of the last fifth.
    """

    size: int
    samples: int
    signal: SignalToNoise
    first_norm: float
    last_norm: float

    @property
    def data(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "batch": self.size,
            "samples": self.samples,
            "jitter": self.signal.jitter,
            "fall over jitter": self.signal.ratio,
            "steps to detect": self.signal.steps_to_detect,
            "gradient norm, first fifth": self.first_norm,
            "gradient norm, last fifth": self.last_norm,
        }


COLUMNS = (
    Column[BatchSummary]("Batch", "size"),
    Column[BatchSummary]("Samples trained", "samples"),
    Column[BatchSummary]("Jitter of the training loss", lambda row: row.signal.jitter, "{:.2g}".format),
    Column[BatchSummary]("Fall of L_det / jitter", lambda row: row.signal.ratio, partial(format_number, digits=2)),
    Column[BatchSummary]("Steps to see it", lambda row: row.signal.steps_label),
    Column[BatchSummary]("Gradient norm, first fifth", "first_norm", "{:.2g}".format),
    Column[BatchSummary]("Gradient norm, last fifth", "last_norm", "{:.2g}".format),
)


def figure_9(extra_runs: ExtraRuns) -> ExperimentResult:
    """Train with each batch size, plot the curves, and summarise what each shows."""
    sizes, steps = SIZES[extra_runs.quick], STEPS[extra_runs.quick]
    traces: dict[int, Trace] = {}
    for size in sizes:
        extra_runs.notify(f"batches of {size}")
        spec = extra_runs.recording_spec(f"figure9/batch-{size}")
        part = spec.config.train_batch_size
        config = replace(
            spec.config,
            output_dir=str(spec.folder),
            max_train_steps=steps,
            gradient_accumulation_steps=max(1, size // part),
            checkpointing_steps=10,
            window=8,  # of a rule that is not evaluated
        )
        traces[size] = train_to_cap(config, lambda run: lambda step, watch: {}, extra_runs.notify)
    description = (
        f"{extra_runs.describe(spec)} Batches of {_join(sizes)}, accumulated {part} at a time; {steps} updates each, "
        "with the same learning rate."
    )
    summaries = [_summarise_trace(size, size * steps, trace) for size, trace in traces.items()]
    return ExperimentResult(
        (_compare_largest_batch(summaries[-1]),),
        (_table_of_batches(summaries, description),),
        (_plot_traces(traces, description),),
    )


def _summarise_trace(size: int, samples: int, trace: Trace) -> BatchSummary:
    fall = measure_signal_to_noise(trace.steps, trace.values).gain
    norms = trace.metric("grad_norm")[1]
    fifth = max(1, len(norms) // 5)
    first, last = (float(np.median(part)) for part in (norms[:fifth], norms[-fifth:]))
    return BatchSummary(
        size, samples, replace(measure_signal_to_noise(*trace.metric("train_loss")), gain=fall), first, last
    )


def _table_of_batches(summaries: Sequence[BatchSummary], description: str) -> Table:
    caption = (
        f"{description} The fall is that of L_det in the same run; the jitter is the standard deviation of the "
        "training loss's first differences over √2. Steps to see it: how many must be averaged before and after for "
        "the fall to be five standard errors. Gradient norms are medians."
    )
    return build_table("batches", caption, COLUMNS, summaries, data=[summary.data for summary in summaries])


def _plot_traces(traces: Mapping[int, Trace], description: str) -> Plot:
    figure, panels = axes(3, len(traces), width=2.4 * len(traces) + 1.2, height=1.25, sharex=True, sharey="row")
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
        f"{description} At the bottom, for comparison, L_det of each run on its 8 held samples. Deviates from the "
        f"paper: the smallest batch is {min(traces)} and not 2, and there are fewer steps, as the whole training is "
        "shorter here."
    )
    return Plot("batches", caption, figure, data)


def _compare_largest_batch(row: BatchSummary) -> str:
    """Say of the one concept that was trained what the largest batch shows."""
    hidden, fall = 3 - row.signal.ratio, row.first_norm - row.last_norm
    sentences = (
        compare_with_paper(
            bootstrap_mean([hidden]),
            f"the training loss still hides the fall with batches of {row.size}",
            f"the training loss no longer hides the fall with batches of {row.size}",
            f"{row.signal.ratio:.2g} times its jitter",
        ),
        compare_with_paper(
            bootstrap_mean([fall]),
            "their gradient norm falls",
            "their gradient norm rises",
            f"{row.first_norm:.2g} at first, {row.last_norm:.2g} at the end",
        ),
    )
    return " ".join(sentences)


def _join(sizes: Sequence[int]) -> str:
    return f"{', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"
