"""TensorBoard's event files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.logs.log_format import LogFormat, Point, format_names


def _has_events(path: Path) -> bool:
    return any(path.rglob("*tfevents*")) if path.is_dir() else "tfevents" in path.name


def _read_tensorboard(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of an event file, or of the one run in a folder."""
    folders = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    runs = [(folder, points) for folder in folders if (points := _read_events(path, folder))]
    if len(runs) > 1:
        names = format_names([str(folder) for folder, _ in runs])
        raise RefusedInput([f"{path} holds the event files of {len(runs)} runs: name the folder of one, of {names}"])
    for _, points in runs:
        yield from points


def _read_events(path: Path, folder: Path) -> list[Point]:
    """Return the points of one event file, or of all event files of one run."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise RefusedInput([f"{path}: event files need {package}: pip install 'dvar[tensorboard]'"]) from error
    # Every record, also those before a restart: `read_log` drops what a resumed run repeats, for all formats alike.
    events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    with _warn_of_damage(folder):
        events.Reload()
    points: list[Point] = [
        (event.step, tag, float(event.value)) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    ]
    for tag in events.Tags()["tensors"]:  # writers of the newer style keep their scalars here, among other things
        tensors = ((event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag))
        points += [
            (step, tag, float(value)) for step, value in tensors if value.size == 1 and value.dtype.kind in "fiu"
        ]
    return points


@contextmanager
def _warn_of_damage(path: Path) -> Iterator[None]:
    """Warn where tensorboard stops at a damaged record, of which it tells its debugging log alone."""
    logger, damage = logging.getLogger("tensorboard"), _Damage()
    level, propagate = logger.level, logger.propagate
    logger.addHandler(damage)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(damage)
        logger.setLevel(level)
        logger.propagate = propagate
    if damage.messages:
        message = f"{path}: an event file ends within a record or is damaged there; what follows was not read"
        warnings.warn(f"{message} ({damage.messages[0]})", stacklevel=2)


class _Damage(logging.Handler):
    """What tensorboard says of damaged records."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg.startswith("Truncated record"):
            self.messages.append(record.getMessage())


TENSORBOARD = LogFormat(
    "TensorBoard's event files, or a folder of them (diffusers, kohya, OneTrainer)", _has_events, _read_tensorboard
)
