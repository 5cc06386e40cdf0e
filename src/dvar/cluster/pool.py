"""A pool of workers that pull tasks from one queue: submit, events, cancel."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any

from dvar.cluster.task import ENDS, Report, TaskEvent, Worker, WorkerTask, failure
from dvar.errors import first_line

POLL_SECONDS = 1.0
"""Seconds after which a worker that waits for a place on a cluster looks whether it is still needed."""
END_SECONDS = 10.0
"""Seconds to wait at the end for a thread that talks to a cluster which does not answer."""


@dataclass
class _Progress:
    """What the pool knows of a task that has not ended.

    Attributes:
        failures, preemptions: Attempts that failed, and workers that were lost, since the task last got further.
        step: The highest step at which an attempt began.
        fresh: Whether this attempt has reported no step yet.
    """

    task: WorkerTask
    failures: int = 0
    preemptions: int = 0
    step: int = 0
    fresh: bool = True


class Pool:
    """Workers, each of which takes a task when it is free.

    A task that fails, or whose worker is lost, waits again until it has used up its attempts; they are counted from
    the last time that an attempt began at a higher step, so a task that gets further is never given up. Used as a
    context, it waits for its processes at the end, which save if they are still busy.

    Args:
        workers: The workers.
        retries: How often a task may fail, without getting further, and be tried again.
        preemptions: How often it may lose its worker through no fault of its own.
    """

    def __init__(self, workers: Sequence[Worker], *, retries: int = 0, preemptions: int = 0) -> None:
        self.workers, self.retries, self.preemptions = workers, retries, preemptions
        self._waiting: queue.SimpleQueue[WorkerTask | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[tuple[str, Worker, Report]] = queue.SimpleQueue()
        self._pending: dict[str, _Progress] = {}
        self._running: dict[str, Worker] = {}
        self._cancelled: set[str] = set()
        self._broken: set[str] = set()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in workers]

    def __enter__(self) -> Pool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pending:
            self.cancel()
            for _ in self.events():
                pass
        self._closed.set()
        for _ in self.workers:
            self._waiting.put(None)
        for worker in self.workers:
            worker.close()
        for thread in self._threads:  # one that asked a cluster after its end would join the next one, and die with it
            thread.join(END_SECONDS)

    @property
    def running(self) -> list[str]:
        """The names of the tasks that are running."""
        return list(self._running)

    def submit(self, task: WorkerTask) -> None:
        """Let a task wait for the next worker that is free."""
        self._pending[task.name] = _Progress(task)
        self._waiting.put(task)

    def events(self, every: float = 60.0) -> Iterator[TaskEvent | None]:
        """Yield the events of all tasks until each has ended.

        An interruption asks the running tasks to save, and is raised once all have ended; a second one kills them.

        Args:
            every: Seconds without an event after which None is yielded.
        """
        interrupted = False
        while self._pending:
            try:
                try:
                    name, worker, report = self._reports.get(timeout=1.0 if interrupted else every)
                except queue.Empty:
                    event = None
                    if interrupted and not self._running and self._waiting.empty():
                        break  # the interruption came while a report was being taken
                else:
                    event = self._take_report(name, worker, report)
            except KeyboardInterrupt:
                if interrupted:
                    for worker in self.workers:
                        worker.kill()
                interrupted = True
                self.cancel()
                continue
            yield event
        if interrupted:
            self._pending.clear()
            raise KeyboardInterrupt

    def cancel(self, name: str | None = None) -> None:
        """Ask a task, or all of them, to save and end; one that waits is not started."""
        names = list(self._pending) if name is None else [name]
        self._cancelled |= {*names}
        for worker in [self._running[name] for name in names if name in self._running]:
            worker.cancel()

    def _work(self, worker: Worker) -> None:
        """Take one task after another from the queue: the life of a thread."""
        while True:
            error = self._wait_until_ready(worker)
            if self._closed.is_set() or (task := self._waiting.get()) is None:
                return
            self._running[task.name] = worker
            if task.name in self._cancelled:
                self._reports.put((task.name, worker, {"report": "interrupted"}))
            else:
                self._reports.put((task.name, worker, {"report": "started"}))
                for report in [_breakdown(error)] if error else self._run(worker, task):
                    if report["report"] in ENDS:
                        self._running.pop(task.name, None)
                    self._reports.put((task.name, worker, report))
            self._running.pop(task.name, None)

    def _wait_until_ready(self, worker: Worker) -> Exception | None:
        """Wait until a worker can take a task, or the pool is closed; return what broke it if all of them are broken.

        One that is broken leaves the tasks to the others, until none is left that could run them.
        """
        while not self._closed.is_set():
            try:
                is_ready = worker.ready(POLL_SECONDS)
                self._broken.discard(worker.name)
                if is_ready:
                    return None
            except Exception as error:  # of its cluster
                self._broken.add(worker.name)
                if len(self._broken) == len(self.workers):
                    return error
                self._closed.wait(POLL_SECONDS)
        return None

    @staticmethod
    def _run(worker: Worker, task: WorkerTask) -> Iterator[Report]:
        """Yield the reports of a task; where its worker breaks, the last one is a failure."""
        try:
            yield from worker.run(task)
        except Exception as error:
            yield _breakdown(error)

    def _take_report(self, name: str, worker: Worker, report: Report) -> TaskEvent:
        """Return the event that a report is, after deciding whether a task that ended is tried again."""
        progress = self._pending[name]
        facts = {key: value for key, value in report.items() if key not in ("report", "retry")}
        kind: Any = report["report"]
        if kind == "started":
            progress.fresh = True
            facts |= {"attempt": 1 + progress.failures + progress.preemptions}
        elif kind == "progress":
            self._count_step(progress, int(report.get("step", 0)))
        elif name not in self._cancelled and kind == "failed" and report.get("retry"):
            progress.failures += 1
            kind = "retried" if progress.failures <= self.retries else "failed"
        elif name not in self._cancelled and kind == "interrupted":
            progress.preemptions += 1
            kind = "preempted" if progress.preemptions <= self.preemptions else "interrupted"
        if kind in ("retried", "preempted"):
            self._waiting.put(progress.task)
        elif kind in ENDS:
            del self._pending[name]
        return TaskEvent(name, kind, worker.name, facts)

    def _count_step(self, progress: _Progress, step: int) -> None:
        """Forget earlier failures of a task if this attempt began at a higher step than those before it."""
        if progress.fresh and step > progress.step:
            progress.failures = progress.preemptions = 0
            progress.step = step
        progress.fresh = False


def _breakdown(error: Exception) -> Report:
    """Return the report of a task whose worker broke."""
    return failure(f"the worker broke ({type(error).__name__}: {first_line(error)})")


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt at a signal that has no handler and would end this process.  Main thread only.

    SIGTERM and the end of the terminal then interrupt as Ctrl-C does: the workers are asked to save.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    signals = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no SIGHUP
    unhandled = [number for number in signals if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in unhandled:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in unhandled:
            signal.signal(number, signal.SIG_DFL)
