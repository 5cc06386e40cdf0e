"""Restoring recorded runs: their weights and images, and any step of them trained again."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from dvar import mini
from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.backbone import Backbone
from dvar.errors import CheckpointError, RefusedInput
from dvar.files import read_json, regular_file, staged_file
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import Checkpoint
from dvar.training.methods.registry import config_from_dict
from dvar.training.personalise import prepare
from dvar.training.run import TrainingRun
from dvar.training.run_layout import CLASS_IMAGES, CONFIG, TRACE, checkpoint_paths, checkpoint_step, step_name

WEIGHTS, SHEETS, RESCORED_SHEETS = "weights", "pictures", "pictures-anew"
"""Folders of the weights and images of scored steps, and of the images of rescored steps."""


GPU_TOLERANCE = 1e-2
"""Relative difference between the loss of an update and the recorded one that a GPU may cause, which adds in no fixed
order. Another image, timestep or noise changes the loss by tens of per cent."""


def weights_path(folder: Path, step: int) -> Path:
    """Return the path of the trained weights of a step, which exists if they were kept."""
    return folder / WEIGHTS / f"{step_name(step)}.safetensors"


def sheet_path(folder: Path, step: int, kind: str = SHEETS) -> Path:
    """Return the path of the images of a step, which exists if they were kept."""
    return folder / kind / f"{step_name(step)}.png"


def write_sheet(path: Path, rows: Sequence[Sequence[Image.Image]]) -> None:
    """Write rows of square images of one size as one PNG; `read_sheet` returns them bit for bit."""
    side = rows[0][0].width
    sheet = Image.new("RGB", (side * max(map(len, rows)), side * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (side * x, side * y))
    path.parent.mkdir(exist_ok=True)
    with staged_file(path) as staged:
        sheet.save(staged, format="PNG")


def read_sheet(path: Path, rows: int = 2) -> list[list[Image.Image]]:
    """Return the rows of images of a step: those of training prompts, then those of validation prompts."""
    with Image.open(regular_file(path)) as opened:
        sheet = opened.convert("RGB")
    side = sheet.height // rows
    boxes = [[(x, y, x + side, y + side) for x in range(0, sheet.width, side)] for y in range(0, sheet.height, side)]
    return [[sheet.crop(box) for box in row] for row in boxes]


def restore_model(folder: str | Path, step: int) -> Backbone:
    """Return the model of a recorded run as it was after ``step`` updates.

    Raises:
        RefusedInput, CheckpointError: As `restore_runs`.
    """
    return next(restore_runs(folder, [step])).backbone


def restore_runs(folder: str | Path, steps: Sequence[int]) -> Iterator[TrainingRun]:
    """Yield the training run with its model as it was after each of ``steps``, from the first to the last.

    The weights are those that were kept, or are trained again from the nearest checkpoint or step before, which gives
    the same bits on the same kind of CPU with the same number of threads. The folder is only read.

    Yields:
        The same object each time.

    Raises:
        RefusedInput: The folder holds no recorded run, or a step is beyond its cap.
        CheckpointError: There is no checkpoint to start from, or a replayed loss differs from the recorded one.
    """
    folder = Path(folder)
    try:
        trace = Trace.read(folder / TRACE)
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} holds no recorded run ({error}): record it first"]) from error
    if outside := [step for step in steps if not 0 <= step <= trace.last_step]:
        raise RefusedInput([f"step must lie between 0 and {trace.last_step}, where {folder} ends, got {outside[0]}"])
    with tempfile.TemporaryDirectory() as output:
        run = prepare_rerun(folder, output)
    losses = {row["step"]: row.get("train_loss") for row in trace.records}
    current = -1  # the step of the weights and of the optimizer's state; -1 if they are of different steps
    for step in sorted(set(steps)):
        path = weights_path(folder, step)
        if path.exists():
            run.method.load(load_file(regular_file(path)))
            current = -1
        else:
            _replay(run, folder, current, step, losses)
            current = step
        yield run


def prepare_rerun(folder: Path, output: str | Path) -> TrainingRun:
    """Return the recorded run in ``folder`` as it began, with ``output`` as its folder, which is not opened yet.

    The images of a bundled concept are taken from this installation: another one may have recorded the run.

    Raises:
        RefusedInput: The folder holds no recorded run.
        DvarError: The run cannot be prepared, as in the trainer.
    """
    try:
        config = config_from_dict(read_json(folder / CONFIG))
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} holds no recorded run ({error}): record it first"]) from error
    changes: dict[str, Any] = {"output_dir": str(output), "overwrite": False, "resume_from_checkpoint": None}
    images, bundled = Path(config.instance_data_dir or ""), mini.concepts().get(folder.parent.name)
    if bundled and images.parts[-3:] == bundled.parts[-3:]:
        changes["instance_data_dir"] = str(bundled)
    if not isinstance(config, TextualInversionConfig) and (folder / CLASS_IMAGES).exists():
        changes["class_data_dir"] = str(folder / CLASS_IMAGES)
    return prepare(replace(config, **changes))[0]


def _replay(run: TrainingRun, folder: Path, current: int, step: int, losses: dict[int, float | None]) -> None:
    """Train a run on to ``step``, from step ``current`` or from a later checkpoint, and compare the losses."""
    checkpoints = {checkpoint_step(path): path for path in checkpoint_paths(folder)}
    nearest = max((other for other in checkpoints if other <= step), default=None)
    if nearest is None:
        raise CheckpointError(f"{folder} holds no checkpoint before step {step}: record it again")
    if current < nearest:
        run.learner.restore(Checkpoint.read(checkpoints[nearest]))
        current = nearest
    for number in range(current + 1, step + 1):
        update = run.learner.update(run.training_losses, number)
        tolerance = 0.0 if run.backbone.device.type == "cpu" else GPU_TOLERANCE
        if not _is_close(update.train_loss, losses.get(number), tolerance):
            rule = f"step {number} gave the loss {update.train_loss!r}, and {losses.get(number)!r} was recorded"
            remedy = "use its kind of CPU, its versions and its thread count"
            raise CheckpointError(f"{folder} cannot be replayed here: {rule}; {remedy}")


def _is_close(loss: float | None, recorded: float | None, tolerance: float) -> bool:
    if loss is None or recorded is None:
        return loss is recorded
    return loss == recorded or math.isclose(loss, recorded, rel_tol=tolerance)
