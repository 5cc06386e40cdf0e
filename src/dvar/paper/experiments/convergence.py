"""Figures 1, 2, 6, 7 and 14: what can be seen of convergence in the training loss, its gradient, CLIP and L_det."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import SignalToNoise, information
from dvar.analysis.stop_quality import REPORT, half
from dvar.paper.result import ExperimentResult, Plot, Provenance, compared, title
from dvar.paper.style import COLOURS, INK, NOISE, SIGNAL, axes, mark
from dvar.recordings.archive import RecordedRun, RecordingArchive

LOSS_NAME = r"$L_{det}$"
BEFORE = 30
"""Steps before L_det climbs back, in which a gradient is looked for that threw it off."""
MORE = 4
"""Concepts of each method in Figure 14."""


def figure_1(shelf: RecordingArchive) -> ExperimentResult:
    """The summary: the training loss and the gradient say nothing of what L_det shows."""
    record = shelf.examples("textual-inversion", 1)[0]
    return _exhibit(
        "figure1", "Figure 1: the same loss, noisy and fixed", [record], ("train_loss", "grad_norm", "eval")
    )


def figure_2(shelf: RecordingArchive) -> ExperimentResult:
    """One concept of Textual Inversion, all four series."""
    return _method(shelf, "figure2", "Figure 2: convergence of", "textual-inversion")


def figure_6(shelf: RecordingArchive) -> ExperimentResult:
    """One concept of Custom Diffusion."""
    return _method(shelf, "figure6", "Figure 6: convergence of", "custom-diffusion")


def figure_7(shelf: RecordingArchive) -> ExperimentResult:
    """One concept of DreamBooth."""
    return _method(shelf, "figure7", "Figure 7: convergence of", "dreambooth-lora")


def figure_14(shelf: RecordingArchive) -> ExperimentResult:
    """More concepts of every method."""
    records = [record for method in shelf.methods for record in shelf.examples(method, MORE)]
    made = [_exhibit("figure14", "", list(_of(records, method)), tuple(SERIES)) for method in shelf.methods]
    plots = tuple(plot for one in made for plot in one.plots)
    says = tuple(line for one in made for line in one.says)
    return ExperimentResult("figure14", "Figure 14: convergence on more concepts", says, plots=plots)


def _of(records: Sequence[RecordedRun], method: str) -> list[RecordedRun]:
    return [record for record in records if record.method == method]


def _method(shelf: RecordingArchive, name: str, heading: str, method: str) -> ExperimentResult:
    return _exhibit(name, f"{heading} {title(method)}", list(shelf.examples(method, 1)), tuple(SERIES))


def _exhibit(name: str, heading: str, records: list[RecordedRun], shown: tuple[str, ...]) -> ExperimentResult:
    drawn, panels = axes(len(shown), len(records), width=max(7.0, 3.2 * len(records)), height=1.35, sharex="col")
    data = []
    for column, record in enumerate(records):
        stop = strategies.read(strategies.paper_dvar(record, scaled=True), record)
        for row, series in enumerate(shown):
            panel = panels[row][column]
            steps, values = SERIES[series][1](record)
            colour = SIGNAL if series == "eval" else INK if series == "clip_image" else NOISE
            dots = {"marker": "o", "markersize": 2.5} if series == "clip_image" else {}
            panel.plot(steps, values, color=colour, linewidth=0.7 if colour == NOISE else 1.3, **dots)
            if not stop.censored:
                mark(panel, stop.stop, f"DVAR {stop.stop}" if not row else "", COLOURS[1], (0, (4, 3)))
            if series == "grad_norm":
                panel.set_yscale("log")  # a rare large one would flatten all others
            panel.set_ylabel(SERIES[series][0] if not column else "")
            data.append({"record": record.name, "series": series, "step": steps, "value": values})
        panels[0][column].set_title(record.concept.replace("_", " ") if len(records) > 1 else "")
        panels[-1][column].set_xlabel("step")
    caption = (
        f"{title(records[0].method)}. From above: {', '.join(SERIES[series][2] for series in shown)}. Dashed: where "
        f"DVAR stops by the paper's preset, scaled in time. {Provenance.of(records)} Concepts are the first by name."
    )
    plot = Plot(f"convergence-{records[0].method}", caption, drawn, data)
    return ExperimentResult(name, heading, _told(records), plots=(plot,))


def _told(records: Sequence[RecordedRun]) -> tuple[str, ...]:
    """Whether the training loss hides what L_det shows, in numbers: each one's fall over its jitter."""
    found = {name: [_information(record, name) for record in records] for name in ("train_loss", "eval")}
    noisy, fixed = (float(np.median([one.ratio for one in found[name]])) for name in ("train_loss", "eval"))
    claim = (
        f"L_det shows the fall ({fixed:.1f} times its jitter) and the training loss hides it ({noisy:.2g} times; "
        f"{title(records[0].method)}, median of {len(records)})"
    )
    return compared(claim, fixed > 3 > noisy), _relapses(records)


def _relapses(records: Sequence[RecordedRun]) -> str:
    """Whether L_det stays down once it has fallen, and how large a gradient was before it climbed back."""
    found = [times for record in records if (times := relapse(record)) is not None]
    claim = f"once it has fallen half of its way, L_det of {title(records[0].method)} stays below its first value"
    if not found:
        return compared(claim, True)
    low, high = (f"{times:,.0f}" for times in (min(found), max(found)))
    large = f"{low if low == high else f'{low} to {high}'} times the median"
    seen = f"it climbs back in {len(found)} of {len(records)}, within {BEFORE} steps of a gradient {large}"
    return compared(f"{claim} ({seen})", False)


def relapse(record: RecordedRun) -> float | None:
    """The largest gradient's norm, in medians of the run, of the steps before L_det climbs back above its first value
    after half of its fall; None where it does not.
    """
    steps, values = _series("eval")(record)
    fallen = int(np.argmax(values <= (values[0] + values.min()) / 2))
    back = np.flatnonzero(values[fallen:] > values[0])
    if not back.size:
        return None
    at = steps[fallen + back[0]]
    there, norms = _series("grad_norm")(record)
    return float(norms[(at - BEFORE <= there) & (there <= at)].max() / np.median(norms))


def _information(record: RecordedRun, series: str) -> SignalToNoise:
    steps, values = record.series(series)
    return information(steps, values.mean(axis=1))


def _series(name: str) -> Callable[[RecordedRun], tuple[Any, Any]]:
    def read(record: RecordedRun) -> tuple[Any, Any]:
        steps, values = record.series(name)
        return steps, values.mean(axis=1)

    return read


def _clip(record: RecordedRun) -> tuple[Any, Any]:
    steps, values = half(record, "train", "clip_image", REPORT)
    return steps, values.mean(axis=1)


SERIES: dict[str, tuple[str, Callable[[RecordedRun], tuple[Any, Any]], str]] = {
    "train_loss": ("training loss", _series("train_loss"), "the training loss"),
    "grad_norm": ("gradient norm", _series("grad_norm"), "the gradient's norm"),
    "clip_image": ("CLIP image", _clip, "Train CLIP image"),
    "eval": (LOSS_NAME, _series("eval"), "L_det on the held batch"),
}
"""Label, reader and words of each series, in the order of the paper's panels."""
