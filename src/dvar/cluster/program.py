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
from functools import partial
from pathlib import Path
from typing import IO, Any, Protocol

from dvar.cluster.task import failure
from dvar.errors import (
    CheckpointError,
    DvarError,
    FolderInUse,
    ModelError,
    NonFiniteLoss,
    RefusedInput,
    UnreachableModel,
    first_line,
)

Run = Callable[[str, Callable[..., None]], Mapping[str, Any]]
"""(argument of a task, report of progress by keyword) -> facts about its end."""
End = Mapping[str, Any] | Exception | KeyboardInterrupt
"""The facts about the end of a task, or what ended it: KeyboardInterrupt where it was asked to stop."""
HOPELESS = (RefusedInput, ModelError, CheckpointError, NonFiniteLoss)
"""Errors that another attempt would only repeat, but for those of `PASSING`."""
PASSING = (FolderInUse, UnreachableModel)


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


class Team(Protocol):
    """Tasks that a program runs at once, each a little further at a time."""

    def __len__(self) -> int:
        """Return the number of tasks that have not ended."""
        ...

    def add(self, name: str, argument: str, report: Callable[..., None]) -> None:
        """Let a task begin; ``report`` takes its progress by keyword."""
        ...

    def cancel(self, name: str) -> None:
        """Ask a task to save and end, if it is there; from another thread."""
        ...

    def advance(self) -> Mapping[str, End]:
        """Go on a little, and return the ends of the tasks that have ended, by name."""
        ...


def serve_team(team: Team) -> int:
    """Run tasks of a `dvar.cluster.shared.SharedProcess` until standard input ends, as `serve` does, but all at once.

    What they print goes to standard error, which is the log of the process.
    """
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    tasks: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    names, cancelled = set[str](), set[str]()
    threading.Thread(target=_read_messages, args=(team, tasks, names, cancelled), daemon=True).start()
    is_open = True
    try:
        while is_open or len(team):
            with suppress(queue.Empty):
                if task := tasks.get(block=not len(team)):
                    team.add(task["name"], task["argument"], partial(_report_progress, channel, task["name"]))
                    if task["name"] in cancelled:  # before it was there
                        team.cancel(task["name"])
                else:
                    is_open = False
                continue
            for name, end in team.advance().items():
                names.discard(name)
                cancelled.discard(name)
                report = (
                    _report_of(end, f"{name}: ")
                    if isinstance(end, Exception | KeyboardInterrupt)
                    else {"report": "done", **end}
                )
                _send(channel, {**report, "task": name})
    except KeyboardInterrupt:  # asked a second time
        return 130
    return 0


def _read_messages(
    team: Team, tasks: queue.SimpleQueue[dict[str, Any] | None], names: set[str], cancelled: set[str]
) -> None:
    """Take tasks and wishes to cancel one; at the end of standard input, cancel all."""
    for line in sys.stdin:
        message = json.loads(line)
        if name := message.get("cancel"):
            cancelled.add(name)
            team.cancel(name)
        else:
            names.add(message["name"])
            tasks.put(message)
    for name in list(names):
        cancelled.add(name)
        team.cancel(name)
    tasks.put(None)


def _report_progress(channel: IO[str], task: str, **facts: Any) -> None:
    _send(channel, {"report": "progress", **facts, "task": task})


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
    except (Exception, KeyboardInterrupt) as error:
        return _report_of(error)
    return {"report": "done", **facts}


def _report_of(error: Exception | KeyboardInterrupt, prefix: str = "") -> dict[str, Any]:
    """Return the report of an end by ``error``, which is printed after the prefix."""
    if isinstance(error, KeyboardInterrupt):
        return {"report": "interrupted"}
    if isinstance(error, DvarError):
        reason = " ".join(str(error).split())
        print(f"dvar: {prefix}{reason}", file=sys.stderr)
        return failure(reason, retry=isinstance(error, PASSING) or not isinstance(error, HOPELESS))
    traceback.print_exception(error)  # a fault of this program: the log has its place
    return failure(f"{type(error).__name__}: {first_line(error)}")


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
