"""A recorded run taken up again: the pictures and weights that it kept, and any step of it trained once more."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from dvar import mini
from dvar.config.training import TextualInversionConfig, restored
from dvar.diffusion.backbone import Backbone
from dvar.errors import CheckpointError, RefusedInput
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import Checkpoint, saved
from dvar.training.personalise import prepared
from dvar.training.run import TrainingRun
from dvar.training.run_layout import CLASS_PICTURES

WEIGHTS, SHEETS, ANEW = "weights", "pictures", "pictures-anew"
"""Folders of what was kept at scored steps, and of the pictures of steps that were drawn anew afterwards."""


def weights_at(folder: Path, step: int) -> Path:
    """Return the file of what was learned at a step, where it was kept."""
    return folder / WEIGHTS / f"step-{step:06d}.safetensors"


def sheet_at(folder: Path, step: int, kind: str = SHEETS) -> Path:
    """Return the file of a step's pictures, where they were kept."""
    return folder / kind / f"step-{step:06d}.png"


def write_sheet(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Write pictures of one size as one PNG, a row each; `read_sheet` gives them back bit for bit."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (side * x, side * y))
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    sheet.save(part, format="PNG")
    part.replace(path)


def read_sheet(path: Path, rows: int = 2) -> list[list[Image.Image]]:
    """Return the pictures of a scored step: those of training prompts, then those of validation prompts."""
    with Image.open(path) as opened:
        sheet = opened.convert("RGB")
    side = sheet.height // rows
    boxes = [[(x, y, x + side, y + side) for x in range(0, sheet.width, side)] for y in range(0, sheet.height, side)]
    return [[sheet.crop(box) for box in row] for row in boxes]


def learned_at(folder: str | Path, step: int) -> Backbone:
    """Return the model of a recorded run as it was after ``step`` updates.

    Raises: as `learned_along`.
    """
    return next(learned_along(folder, [step])).backbone


def learned_along(folder: str | Path, steps: Sequence[int]) -> Iterator[TrainingRun]:
    """Yield the run's job with its model as it was after each of ``steps``, from the first to the last: from weights
    that were kept, or trained again from the nearest checkpoint or step before, which gives the very same weights (on
    the same kind of CPU at equal thread count).

    It is the same job each time, and the folder is only read.
    Raises: RefusedInput when it holds no recorded run, or a step is beyond its cap; CheckpointError when a replayed
    loss differs from the recorded one.
    """
    folder = Path(folder)
    try:
        trace = Trace.read(folder / "trace.jsonl")
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} is no recorded run ({error}): record it first"]) from error
    if wrong := [step for step in steps if not 0 <= step <= trace.last_step]:
        raise RefusedInput([f"step must lie between 0 and {trace.last_step}, where {folder} ends, got {wrong[0]}"])
    with tempfile.TemporaryDirectory() as elsewhere:
        job = rerun(folder, elsewhere)
    recorded = {row["step"]: row.get("train_loss") for row in trace.records}
    at = -1  # what the optimizer has seen too
    for step in sorted(set(steps)):
        kept = weights_at(folder, step)
        if kept.exists():
            job.method.load(load_file(kept))
            at = -1
            yield job
            continue
        checkpoints = {int(path.name.split("-")[1]): path for path in saved(folder)}
        before = max((there for there in checkpoints if there <= step), default=None)
        if before is None:
            raise CheckpointError(f"{folder} holds no checkpoint before step {step}: record it again")
        if at < before:
            job.learner.restore(Checkpoint.read(checkpoints[before]))
            at = before
        for number in range(at + 1, step + 1):
            update = job.learner.update(job.training_losses, number)
            if job.backbone.device.type == "cpu" and update.train_loss != recorded[number]:
                said = f"step {number} gave the loss {update.train_loss!r}, and {recorded[number]!r} was recorded"
                same = "use its kind of CPU, its versions and its thread count"
                raise CheckpointError(f"{folder} cannot be replayed here: {said}; {same}")
        at = step
        yield job


def rerun(folder: Path, elsewhere: str | Path) -> TrainingRun:
    """Return the recorded run of ``folder`` as it began, ready to be opened in another folder.

    The pictures of a bundled concept are found where they lie now: another installation may have recorded it.
    Raises: RefusedInput when the folder holds no recorded run; what stands in a run's way, as the trainer does.
    """
    try:
        config = restored(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} is no recorded run ({error}): record it first"]) from error
    apart: dict[str, Any] = {"output_dir": str(elsewhere), "overwrite": False, "resume_from_checkpoint": None}
    pictures, bundled = Path(config.instance_data_dir or ""), mini.concepts().get(folder.parent.name)
    if bundled and pictures.parts[-3:] == bundled.parts[-3:]:
        apart["instance_data_dir"] = str(bundled)
    if not isinstance(config, TextualInversionConfig) and (folder / CLASS_PICTURES).exists():
        apart["class_data_dir"] = str(folder / CLASS_PICTURES)
    return prepared(replace(config, **apart))[0]
