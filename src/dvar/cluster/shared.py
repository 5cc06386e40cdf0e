"""Workers that share a process, which runs the tasks of all of them at once."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvar.cluster.local import LocalWorker, explain_end, parse_report, start_process
from dvar.cluster.task import ENDS, Report, Worker, WorkerTask, failure


def start_places(name: str, count: int, gpu: str = "") -> list[Worker]:
    """Return the places of a worker: one for a process of its own, or several that share one.

    Args:
        name: The name of the worker.
        count: How many tasks it runs at once. More than one need a program that uses `serve_team`.
        gpu: As for `LocalWorker`.
    """
    if count == 1:
        return [LocalWorker(name, gpu)]
    process = SharedProcess(name, gpu)
    return [SharedWorker(f"{name}.{number + 1}", process) for number in range(count)]


class SharedProcess:
    """A process that runs several tasks at once; a new one is started where it has died.

    Args:
        name: Its name, for people and for its log, which is beside those of the tasks.
        gpu: As for `LocalWorker`.
    """

    def __init__(self, name: str, gpu: str = "") -> None:
        self.name, self.gpu = name, gpu
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._reports: dict[str, queue.SimpleQueue[Report]] = {}

    def run(self, task: WorkerTask) -> Iterator[Report]:
        """Run a task beside others and yield its reports; the last one is of `ENDS`."""
        reports: queue.SimpleQueue[Report] = queue.SimpleQueue()
        with self._lock:
            self._reports[task.name] = reports
            try:
                self._start(task)
                self._send({"name": task.name, "argument": task.argument})
            except OSError as error:  # no more processes, or a log that cannot be written
                self._reports.pop(task.name)
                reports.put(failure(f"{error.filename or task.program}: {error.strerror or error}"))
        while True:
            report = reports.get()
            if report["report"] in ENDS:
                self._reports.pop(task.name, None)
                yield report
                return
            yield report

    def cancel(self, name: str) -> None:
        """Ask a task to save and end."""
        with self._lock:
            self._send({"cancel": name})

    def close(self) -> None:
        """End the process, and wait for it."""
        with self._lock:
            reader = self._reader
            if self._process and self._process.stdin:
                with suppress(OSError):
                    self._process.stdin.close()
        if reader:
            reader.join()

    def kill(self) -> None:
        """End the process at once."""
        if process := self._process:
            process.kill()

    def _start(self, task: WorkerTask) -> None:
        """Start a process unless there is one."""
        if self._process:
            return
        log = task.log.with_name(f"{self.name}.log")
        before = log.stat().st_size if log.exists() else 0
        self._process = process = start_process(task, log, self.gpu)
        self._reader = threading.Thread(target=self._read, args=(process, log, before), daemon=True)
        self._reader.start()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._process and self._process.stdin and not self._process.stdin.closed:
            with suppress(OSError):  # it has ended: its reader says why
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes], log: Path, before: int) -> None:
        """Hand the reports of a process to the tasks that they are of, and its end to those that have none."""
        assert process.stdin
        assert process.stdout
        for line in process.stdout:
            report = parse_report(line)
            if report and (reports := self._reports.get(report.pop("task", ""))):
                reports.put(report)
        end = explain_end(log, before, process.wait())
        with self._lock:
            with suppress(OSError):  # what could not be sent any more
                process.stdin.close()
            process.stdout.close()
            self._process = None
            for reports in self._reports.values():
                reports.put(end)
            self._reports.clear()


class SharedWorker:
    """A worker of several that share a process.

    Args:
        name: Its name, for people.
        process: The process.
    """

    def __init__(self, name: str, process: SharedProcess) -> None:
        self.name, self.process = name, process
        self._task = ""

    def ready(self, seconds: float) -> bool:
        """Return True: a process can always be started."""
        return True

    def run(self, task: WorkerTask) -> Iterator[Report]:
        """Run a task and yield its reports; the last one is of `ENDS`."""
        self._task = task.name
        return self.process.run(task)

    def cancel(self) -> None:
        """Ask the task that is running to save and end."""
        self.process.cancel(self._task)

    def close(self) -> None:
        """End the process once the tasks of all its workers have ended."""
        self.process.close()

    def kill(self) -> None:
        """End the process at once, with the tasks of all its workers."""
        self.process.kill()
