"""Figure 4: the scores along training, method by method, and where on them each way stops."""

from __future__ import annotations

import numpy as np

from dvar.analysis.stop_quality import REPORT, half, score
from dvar.paper.experiments.cost import SCORES, CostRow, rows
from dvar.paper.result import ExperimentResult, Plot, Provenance, compared, title
from dvar.paper.style import COLOURS, INK, axes
from dvar.recordings.archive import Part, RecordedRun, RecordingArchive


def make(shelf: RecordingArchive) -> ExperimentResult:
    """Mean scores over concepts with every way's mean stop."""
    shown = [one for one in SCORES if all(one[1:] in record.pictures for record in shelf)]
    drawn, panels = axes(len(shown), len(shelf.methods), width=3.3 * len(shelf.methods) + 1, height=1.7, sharex="col")
    data, says = [], []
    for column, method in enumerate(shelf.methods):
        found, records = rows(shelf, method), shelf.of(method)
        for place, (name, part, metric) in enumerate(shown):
            panel = panels[place][column]
            steps, middle, width = _band(records, part, metric)
            panel.fill_between(steps, middle - width, middle + width, color=INK, alpha=0.08, linewidth=0)
            panel.plot(steps, middle, color=INK, linewidth=1.2)
            data.append({"method": method, "score": name, "step": steps, "mean": middle, "sd": width})
            for number, row in enumerate(found):
                _stop(panel, row, part, metric, COLOURS[number % len(COLOURS)])
            panel.set_ylabel(name if not column else "")
        panels[0][column].set_title(title(method))
        panels[-1][column].set_xlabel("step")
        says.append(_pattern(method, records))
    names = list(dict.fromkeys(line.get_label() for row in panels for panel in row for line in panel.collections[1:]))
    handles = {artist.get_label(): artist for row in panels for panel in row for artist in panel.collections[1:]}
    drawn.legend([handles[name] for name in names], names, loc="outside lower center", ncols=4)
    every = [record for method in shelf.methods for record in shelf.of(method)]
    caption = (
        "Line: mean over concepts and seeds; band: one standard deviation over records. A dot is a way, at the mean of "
        f"the steps it keeps and its score in Table 1. {Provenance.of(every)}"
    )
    return ExperimentResult(
        "figure4",
        "Figure 4: scores along training, and where each way stops",
        tuple(says),
        plots=(Plot("ways", caption, drawn, data),),
    )


def _band(records: tuple[RecordedRun, ...], part: Part, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps all records share the range of, and mean and standard deviation of the score there."""
    steps = records[0].scored_steps
    steps = steps[steps <= min(record.cap for record in records)]
    curves = []
    for record in records:
        at, values = half(record, part, metric, REPORT)
        curves.append(np.interp(steps, at, values.mean(axis=1)))
    return steps, np.mean(curves, axis=0), np.std(curves, axis=0)


def _stop(panel, row: CostRow, part: Part, metric: str, colour: str) -> None:  # type: ignore[no-untyped-def]
    step = float(np.mean([reading.kept for reading in row.readings]))
    height = float(np.mean(row.scores(part, metric)))
    panel.scatter([step], [height], s=34, color=colour, edgecolor="white", linewidth=0.8, zorder=3, label=row.way)


def _pattern(method: str, records: tuple[RecordedRun, ...]) -> str:
    falls = [score(r, 0, "validation", "clip_text") - score(r, r.cap, "validation", "clip_text") for r in records]
    fall = float(np.mean(falls))
    moved = f"it {'falls' if fall > 0 else 'rises'} by {abs(fall):.3f} from the first step to the last"
    claim = f"long training loses Validation CLIP text ({moved})"
    return f"{title(method)}. {compared(claim, fall > 0)}"
