"""The inside of a worker process: tasks arrive on standard input, reports leave on standard output."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dvar.cluster.task import failure
from dvar.errors import CheckpointError, DvarError, FolderInUse, ModelError, NonFiniteLoss, RefusedInput, first_line

Run = Callable[[str, Callable[..., None]], Mapping[str, Any]]
"""(argument of a task, report of progress by keyword) -> facts about its end."""
HOPELESS = (RefusedInput, ModelError, CheckpointError, NonFiniteLoss)
"""Errors that another attempt would only repeat."""


def serve(run: Run) -> int:
    """Run tasks until standard input ends; then the task that is running is asked to save, as by SIGTERM.

    So a worker outlives neither the process that started it nor, by more than what it takes to save, its purpose.

    Args:
        run: Runs a task; it raises KeyboardInterrupt where it was asked to stop and can go on later.
    """
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_read_tasks, args=(tasks, busy), daemon=True).start()
    while task := tasks.get():
        busy.set()
        with _output_appended_to(Path(task["log"])):
            end = _run_task(run, task["argument"], channel)
        busy.clear()
        _send(channel, end)
    return 0


def _read_tasks(tasks: queue.SimpleQueue[dict[str, Any] | None], busy: threading.Event) -> None:
    for line in sys.stdin:
        tasks.put(json.loads(line))
    tasks.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _run_task(run: Run, argument: str, channel: IO[str]) -> dict[str, Any]:
    """Run a task and return the report of its end."""
    try:
        facts = run(argument, lambda **facts: _send(channel, {"report": "progress", **facts}))
    except KeyboardInterrupt:
        return {"report": "interrupted"}
    except DvarError as error:
        reason = " ".join(str(error).split())
        print(f"dvar: {reason}", file=sys.stderr)
        return failure(reason, retry=isinstance(error, FolderInUse) or not isinstance(error, HOPELESS))
    except Exception as error:  # a fault of this program: the log has its place
        traceback.print_exc()
        return failure(f"{type(error).__name__}: {first_line(error)}")
    return {"report": "done", **facts}


def _send(channel: IO[str], report: Mapping[str, Any]) -> None:
    with suppress(OSError):  # nobody listens any more: the end of standard input ends the task
        channel.write(json.dumps(report) + "\n")


@contextmanager
def _output_appended_to(log: Path) -> Iterator[None]:
    """Send standard output and standard error, also those of libraries in C, to a file in a scope."""
    sys.stdout.flush()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
