"""Figure 12: what the model draws where DVAR ends the training, beside where Baseline does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dvar.errors import RefusedInput
from dvar.paper.experiments.cost import CostRow, rows
from dvar.paper.result import ExperimentResult, Plot, Provenance, title
from dvar.paper.style import INK, SOFT, axes
from dvar.recordings.archive import RecordedRun, RecordingArchive
from dvar.recordings.restore import ANEW, SHEETS, read_sheet, sheet_at

SHOWN = 4
"""Concepts of each method."""
EACH = 2
"""Pictures of either kind."""


def make(shelf: RecordingArchive) -> ExperimentResult:
    """A figure for every method; recorded runs keep their pictures, and a file of traces does not."""
    plots, says = [], []
    for method in shelf.methods:
        kept = [record for record in shelf.examples(method, len(shelf)) if _sheets(record)]
        if kept:
            plots.append(_plot(shelf, method, kept[:SHOWN]))
        else:
            says.append(f"No pictures of {title(method)} were kept.")
    if not plots:
        raise RefusedInput(["no recorded run has kept its pictures: name a folder of records, not a file of traces"])
    return ExperimentResult("figure12", "Figure 12: side by side", tuple(says), plots=tuple(plots))


def shown_step(record: RecordedRun, step: int) -> int:
    """The step with pictures that lies nearest to `step`, in octaves."""
    steps = np.array(_sheets(record))
    return int(steps[np.abs(np.log2((steps + 1) / (step + 1))).argmin()])


def _sheets(record: RecordedRun) -> list[int]:
    """Steps whose pictures a record has kept."""
    if record.folder is None:
        return []
    return sorted(int(path.stem.removeprefix("step-")) for path in (record.folder / SHEETS).glob("step-*.png"))


def _plot(shelf: RecordingArchive, method: str, records: Sequence[RecordedRun]) -> Plot:
    found = {row.way: row for row in rows(shelf, method)}
    dvar = next(name for name in ("DVAR (tuned)", "DVAR (preset scaled in time)") if name in found)
    columns = 1 + 4 * EACH
    drawn, panels = axes(len(records), columns, width=0.95 * columns, height=1.15)
    data: list[dict[str, Any]] = []
    for line, record in enumerate(records):
        _show(panels[line][0], _reference(record))
        panels[line][0].set_ylabel("\n".join(record.concept.rsplit("_", 1)).replace("_", " "), color=INK)
        steps = {way: _kept(found[way], record) for way in (dvar, "Baseline")}
        sheets = _sheets_of(record, steps)
        for place, (way, kept) in enumerate(steps.items()):
            step, sheet = sheets[way]
            data.append({"record": record.name, "way": way, "kept": kept, "shown": step, "from": sheet.parent.name})
            train, validation = read_sheet(sheet)
            first = 1 + 2 * EACH * place
            for number, picture in enumerate((*train[:EACH], *validation[:EACH])):
                _show(panels[line][first + number], picture)
            panels[line][first].set_xlabel(f"step {kept}", loc="left", color=SOFT, fontsize=8)
    for place, way in enumerate((dvar, "Baseline")):
        panels[0][1 + 2 * EACH * place].set_title(way)
    panels[0][0].set_title("reference")
    caption = (
        f"{title(method)}. One reference, and of each way {EACH} pictures of training prompts, then {EACH} of "
        f"validation prompts, the first there are and the same seeds for both. Named is the step that a way keeps; "
        f"shown are {_shown(data)}. "
        f"{Provenance.of(records)} Concepts are the first by name."
    )
    return Plot(f"pictures-{method}", caption, drawn, data)


def _sheets_of(record: RecordedRun, steps: Mapping[str, int]) -> dict[str, tuple[int, Path]]:
    """For each way the step that is shown, and its pictures: those of the very step where all ways' were drawn anew."""
    assert record.folder
    anew = {way: (step, sheet_at(record.folder, step, ANEW)) for way, step in steps.items()}
    if all(sheet.exists() for _, sheet in anew.values()):
        return anew
    near = {way: shown_step(record, step) for way, step in steps.items()}
    return {way: (step, sheet_at(record.folder, step)) for way, step in near.items()}


def _shown(data: Sequence[dict[str, Any]]) -> str:
    anew = [one["from"] == ANEW for one in data]
    if all(anew):
        return "its pictures on fresh seeds"
    nearest = f"the pictures of the scored step nearest to it (up to {_apart(data):.2f} octaves away)"
    return f"{nearest}, where it was not drawn anew" if any(anew) else nearest


def _kept(row: CostRow, record: RecordedRun) -> int:
    return row.readings[row.records.index(record)].kept


def _apart(data: Sequence[dict[str, Any]]) -> float:
    return max(abs(float(np.log2((one["shown"] + 1) / (one["kept"] + 1)))) for one in data)


def _reference(record: RecordedRun) -> Image.Image | None:
    found = sorted((record.folder / "references").glob("*.png")) if record.folder else []
    return Image.open(found[0]).convert("RGB") if found else None


def _show(panel: Any, picture: Image.Image | None) -> None:
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set_visible(False)
    panel.grid(visible=False)
    if picture is not None:
        panel.imshow(np.asarray(picture), interpolation="nearest")
