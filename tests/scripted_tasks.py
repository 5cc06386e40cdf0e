"""Tasks of the scripted program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dvar.cluster.task import WorkerTask

Turn = list[tuple[str, Any]]


def scripted_task(folder: Path, name: str, *turns: Turn, threads: int = 1) -> WorkerTask:
    """Return a task that does what its turns say, one turn an attempt; the last one serves all later attempts."""
    argument = json.dumps({"attempts": str(folder / f"{name}.attempts"), "turns": turns or [[]]})
    return WorkerTask(name, "scripted", argument, folder / "logs" / f"{name}.log", threads)


def count_attempts(folder: Path, name: str) -> int:
    """Return how often a task has been begun."""
    path = folder / f"{name}.attempts"
    return len(path.read_text().splitlines()) if path.exists() else 0
