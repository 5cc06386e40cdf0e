"""Figure 8: L_det on held batches of 1, 2, 4 and 8, read from the losses that the record keeps sample by sample."""

from __future__ import annotations

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.signal_to_noise import information
from dvar.paper.result import ExperimentResult, Plot, Provenance, Table, compared, spread, title
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import RecordedRun, RecordingArchive
from dvar.stopping.trace import Trace

SIZES = (1, 2, 4, 8)
SHOWN = 3


def make(shelf: RecordingArchive) -> ExperimentResult:
    """L_det by batch size on some concepts; over all, what its curve tells and how far its stops lie apart."""
    method = shelf.methods[0]
    records = shelf.of(method)
    examples = shelf.examples(method, SHOWN)
    drawn, panels = axes(len(SIZES), len(examples), width=3.2 * len(examples) + 0.8, height=1.25, sharex="col")
    data = []
    for column, record in enumerate(examples):
        for row, size in enumerate(SIZES):
            panel = panels[row][column]
            for batch, colour in zip(_batches(record, size), COLOURS, strict=False):
                steps, values = _mean(record, batch)
                panel.plot(steps, 100 * (values / values[0] - 1), color=colour, linewidth=0.9)
                data.append({"record": record.name, "size": size, "samples": batch, "step": steps, "value": values})
            panel.set_ylabel(f"B = {size}, %" if not column else "")
        panels[0][column].set_title(record.concept.replace("_", " "))
        panels[-1][column].set_xlabel("step")
    caption = (
        f"{title(method)}: L_det on batches of each size, in percent of its first value, less 100; a line is a batch, "
        f"and the 8 recorded draws make 8, 4, 2 and 1 of them. Each panel has a scale of its own. "
        f"{Provenance.of(examples)} Deviates from the paper: the batches share 8 draws, and are not drawn anew."
    )
    table = _table(records, method)
    return ExperimentResult(
        "figure8",
        "Figure 8: smaller held batches",
        (_pattern(table),),
        (table,),
        (Plot("batches", caption, drawn, data),),
    )


def _table(records: tuple[RecordedRun, ...], method: str) -> Table:
    lines, data = [], []
    for size in SIZES:
        ratios, stops, apart, never = [], [], [], []
        for record in records:
            found = [_read(record, batch) for batch in _batches(record, size)]
            ratios.append(float(np.median([ratio for ratio, _ in found])))
            ended = [stop for _, stop in found if stop is not None]
            never.append(1 - len(ended) / len(found))
            stops += [float(np.mean(ended))] if ended else []
            apart += [float(np.ptp(np.log2(ended)))] if len(ended) > 1 else []
        lines.append(
            (f"{size}", spread(ratios, 1), spread(stops, 0), spread(apart, 2), f"{100 * np.mean(never):.0f} %")
        )
        data.append(
            {
                "size": size,
                "ratio": float(np.mean(ratios)),
                "stop": float(np.mean(stops)) if stops else None,
                "octaves": float(np.mean(apart)) if apart else None,
                "never": float(np.mean(never)),
            }
        )
    columns = ("Inputs", "Fall over jitter", "DVAR stops at", "Stops lie apart, octaves", "Never stops")
    caption = (
        f"{title(method)}, mean ± standard deviation over {len(records)} records. Stops are of the paper's preset, "
        "scaled in time; an octave is a factor of two between the earliest and the latest batch of a size. With 8 "
        f"inputs there is one batch. {Provenance.of(records)}"
    )
    return Table("sizes", caption, columns, tuple(lines), tuple(data))


def _pattern(table: Table) -> str:
    """Whether smaller batches agree less on where to stop, as Section 4.5 says."""
    apart = {row["size"]: row["octaves"] for row in table.data if row["octaves"] is not None}
    if len(apart) < 2:
        return "Too few batches stopped to say how far their stops lie apart."
    smallest, largest = min(apart), max(apart)
    told = (
        f"{apart[smallest]:.2f} octaves for {smallest} input{'s' * (smallest > 1)}, {apart[largest]:.2f} for {largest}"
    )
    claim = f"the smaller the batch, the further its stops lie apart ({told})"
    return compared(claim, apart[smallest] > apart[largest])


def _batches(record: RecordedRun, size: int) -> list[list[int]]:
    width = record.series("eval")[1].shape[1]
    return [list(range(first, first + size)) for first in range(0, width - size + 1, size)]


def _mean(record: RecordedRun, batch: list[int]) -> tuple[np.ndarray, np.ndarray]:
    steps, values = record.series("eval")
    return steps, values[:, batch].mean(axis=1)


def _read(record: RecordedRun, batch: list[int]) -> tuple[float, int | None]:
    """The fall over the jitter of a batch's L_det, and where DVAR stops on it."""
    steps, values = _mean(record, batch)
    rule, trace = strategies.paper_dvar(record, scaled=True).rule, Trace()
    for step, value in zip(steps.tolist(), values.tolist(), strict=True):
        trace.record(step, value)
        if rule(trace).stop:
            return information(steps, values).ratio, step
    return information(steps, values).ratio, None
