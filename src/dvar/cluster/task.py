"""Tasks, what a program reports of them, and the events that their caller sees."""

# A program is a module of this library whose main function calls `dvar.cluster.program.serve`.  It receives one task
# after another, so that what is slow to load is loaded once, and answers each with reports: JSON objects with their
# kind under "report".  Any number of "progress", then one of `ENDS`.

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

Report = Mapping[str, Any]
ENDS = ("done", "failed", "interrupted")
EventKind = Literal["started", "progress", "retried", "preempted", "done", "failed", "interrupted"]


@dataclass(frozen=True)
class WorkerTask:
    """The work of one process.

    Attributes:
        name: Its name, which no other task has.
        program: The module that is run.
        argument: What the program receives.
        log: The file that its output is appended to.
        threads: CPU threads of the process.
    """

    name: str
    program: str
    argument: str
    log: Path
    threads: int = 1


@dataclass(frozen=True)
class TaskEvent:
    """An event in the life of a task.

    Attributes:
        task: The name of the task.
        kind: "started" each time a worker takes it; "progress"; "retried" after a failure and "preempted" after the
            loss of a worker that was not the task's fault, both before it waits again; and one of `ENDS`, the last.
        worker: The name of the worker.
        facts: What the program reported; "reason" of a failure or loss.
    """

    task: str
    kind: EventKind
    worker: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class Worker(Protocol):
    """A place where one task runs at a time."""

    @property
    def name(self) -> str:
        """Its name, for people."""
        ...

    def ready(self, seconds: float) -> bool:
        """Return whether it can take a task, after waiting so long at most."""
        ...

    def run(self, task: WorkerTask) -> Iterator[Report]:
        """Run a task and yield its reports; the last one is of `ENDS`, whatever happens to the process."""
        ...

    def cancel(self) -> None:
        """Ask the task that is running to save and end."""
        ...

    def close(self) -> None:
        """End the process once its task has ended."""
        ...

    def kill(self) -> None:
        """End the process at once."""
        ...


StartWorkers = Callable[[], list[Worker]]


def failure(reason: str, *, retry: bool = True) -> dict[str, Any]:
    """Return the report of a failure; without ``retry`` the task would fail again in the same way."""
    return {"report": "failed", "reason": reason, "retry": retry}
