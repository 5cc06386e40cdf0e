"""The runs in a folder, with what each is doing: everything is read from the files of the runs themselves."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from dvar.errors import DvarError, RefusedInput, first_line
from dvar.files import read_content, read_json, read_text
from dvar.locks import LOCK, read_holder
from dvar.runs.run_folder import RunFolder
from dvar.studio.run_files import HELD, LOG, REQUEST, STARTED
from dvar.training.run_layout import CONFIG, RESULT, TRACE, checkpoint_paths

State = Literal["queued", "starting", "training", "paused", "finished", "failed"]
DEPTH = 3
"""Folders of runs that may lie inside one another, such as runs/batch/mug."""
STARTING_SECONDS = 300.0
"""The time that a process has to take the lock of its run, which it does before it loads a model."""
_LOG_END = 4000  # characters of a log in which its last lines are looked for


@dataclass(frozen=True)
class LibraryRun:
    """A run of the library.

    Attributes:
        name: Its folder, as a path within the library.
        folder: Its folder.
        state: What it is doing; a run that is paused can go on.
    """

    name: str
    folder: Path
    state: State

    @property
    def opened(self) -> RunFolder | None:
        """The files of the run; None before it has written any, or where they are damaged."""
        try:
            return open_run(self.folder)
        except DvarError:
            return None

    @property
    def problem(self) -> str:
        """The reason why the run failed or cannot be read; empty where nothing is wrong."""
        try:
            if (self.folder / CONFIG).exists():
                open_run(self.folder)
        except DvarError as error:
            return first_line(error)
        return _last_message(self.folder) if self.state == "failed" else ""

    @property
    def is_active(self) -> bool:
        """Whether its files may change by themselves."""
        return self.state in ("queued", "starting", "training")

    @property
    def changed(self) -> float:
        """When it was last written to, in seconds since the epoch."""
        names = (RESULT, TRACE, CONFIG, LOG, REQUEST, HELD)
        return max((_modified(self.folder / name) for name in names), default=0.0)


def list_runs(root: Path) -> list[LibraryRun]:
    """Return the runs in ``root``, the one that was written to last first."""
    runs = [LibraryRun(folder.relative_to(root).as_posix(), folder, read_state(folder)) for folder in _find_runs(root)]
    return sorted(runs, key=lambda run: (run.changed, run.name), reverse=True)


def find_run(root: Path, name: object) -> LibraryRun:
    """Return the run with this name. Only what `list_runs` lists is a run, so no name leaves the folder.

    Raises:
        RefusedInput: There is none.
    """
    folder = next((folder for folder in _find_runs(root) if folder.relative_to(root).as_posix() == name), None)
    if folder is None:
        raise RefusedInput([f"a run must be one of those in {root}, got {str(name)[:80]!r}: choose one of the library"])
    return LibraryRun(str(name), folder, read_state(folder))


def read_state(folder: Path) -> State:
    """Return what the run in ``folder`` is doing."""
    if read_holder(folder / LOCK) is not None:
        return "training" if (folder / TRACE).exists() else "starting"
    if (folder / REQUEST).exists():
        return "queued"
    if (folder / RESULT).exists():
        return "finished"
    if _is_starting(folder):
        return "starting"
    return "paused" if checkpoint_paths(folder) or (folder / HELD).exists() else "failed"


def describe_process(process: int) -> dict[str, Any]:
    """Return what tells a process from others that have its number later: when it began, where the system says that."""
    try:
        stat = read_content(Path(f"/proc/{process}/stat"), 4096)
        began = stat.rpartition(b")")[2].split()[19].decode()  # the name before it may hold anything
    except (OSError, IndexError):
        began = ""
    return {"process": process, "began": began}


def open_run(folder: Path) -> RunFolder:
    """Return what a run has written, read again only where its files have changed.

    Raises:
        DvarError: As `RunFolder.open`.
    """
    names = [*(folder / name for name in (CONFIG, TRACE, RESULT)), folder / "samples"]
    return _open_run(folder, tuple(_modified(path) for path in names))


@lru_cache(maxsize=64)
def _open_run(folder: Path, changes: tuple[float, ...]) -> RunFolder:
    return RunFolder.open(folder)


def _find_runs(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """Yield the folders of runs in ``root``, without those behind links."""
    try:
        folders = sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for folder in folders:
        if folder.name.startswith("."):
            continue
        if any((folder / name).exists() for name in (CONFIG, REQUEST, HELD, LOG)):
            yield folder
        elif depth > 1:
            yield from _find_runs(folder, depth - 1)


def _is_starting(folder: Path) -> bool:
    """Return whether the process that was started for a run is alive: it takes its lock only after some seconds."""
    if sys.platform == "win32":
        return False  # where asking for a process would end it
    try:
        started = read_json(folder / STARTED, {"process": int, "began": str})
        os.kill(started["process"], 0)
    except (OSError, ValueError, OverflowError):
        return False
    is_recent = time.time() - _modified(folder / STARTED) < STARTING_SECONDS
    return is_recent and started == describe_process(started["process"])


def _last_message(folder: Path) -> str:
    """Return the last line that a run has printed."""
    try:
        text = read_text(folder / LOG)
    except (OSError, UnicodeDecodeError):
        return "it ended before its first checkpoint"
    lines = [line.strip() for line in text[-_LOG_END:].splitlines() if line.strip()]
    return lines[-1].removeprefix("dvar: ") if lines else "it ended without a message"


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime_ns / 1e9
    except OSError:
        return 0.0
