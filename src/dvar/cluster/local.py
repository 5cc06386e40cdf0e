"""Workers that are processes of this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from dvar.cluster.task import ENDS, Report, WorkerTask, failure

INTERRUPTED = (130, -signal.SIGTERM)
"""Statuses of a process that was asked to stop: by Ctrl-C, as shells report it, and by SIGTERM."""


def list_slots(workers: int | None, threads: int) -> list[str]:
    """Return a slot for each process that runs at once: the GPU that it may use, or "" for the CPU.

    Args:
        workers: Number of slots; by default one for each GPU, or else as many as there are cores for.
        threads: CPU threads of each process.
    """
    gpus = visible_gpus()
    count = workers or len(gpus) or max(1, usable_cores() // threads)
    return [gpus[number % len(gpus)] if gpus else "" for number in range(count)]


def visible_gpus() -> list[str]:
    """Return the names under which other processes are given this one's GPUs, as CUDA_VISIBLE_DEVICES lists them."""
    import torch  # takes seconds, which those who read the settings of a command need not wait for

    count, listed = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return names[:count] if names else [str(number) for number in range(count)]


def usable_cores() -> int:
    """Return the cores that this process may use; where the system does not say, all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalWorker:
    """A process that runs tasks one after another; a new one is started where it has died or another is needed.

    Args:
        name: Its name, for people.
        gpu: The GPU that it may use; "" for what its parent may use.
    """

    def __init__(self, name: str, gpu: str = "") -> None:
        self.name, self.gpu = name, gpu
        self._process: subprocess.Popen[bytes] | None = None
        self._kind: tuple[str, int] = ("", 0)
        self._cancelled = False

    def ready(self, seconds: float) -> bool:
        """Return True: a process can always be started."""
        return True

    def run(self, task: WorkerTask) -> Iterator[Report]:
        """Run a task and yield its reports; the last one is of `ENDS`."""
        try:
            before = task.log.stat().st_size if task.log.exists() else 0
            process = self._start(task)
        except OSError as error:  # no more processes, or a log that cannot be written
            yield failure(f"{error.filename or sys.executable}: {error.strerror or error}")
            return
        assert process.stdin
        assert process.stdout
        if self._cancelled:
            process.send_signal(signal.SIGTERM)
        with suppress(OSError):  # it has ended: its status says why
            process.stdin.write(json.dumps({"argument": task.argument, "log": str(task.log)}).encode() + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            if report := parse_report(line):
                yield report
                if report["report"] in ENDS:
                    self._cancelled = False
                    return
        self._cancelled = False
        yield explain_end(task.log, before, process.wait())

    def cancel(self) -> None:
        """Ask the task that is running to save and end."""
        self._cancelled = True
        if self._process:
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """End the process, and wait for it."""
        if self._process:
            assert self._process.stdin
            assert self._process.stdout
            with suppress(OSError):
                self._process.stdin.close()
            self._process.wait()
            self._process.stdout.close()
            self._process = None

    def kill(self) -> None:
        """End the process at once."""
        if self._process:
            self._process.kill()

    def _start(self, task: WorkerTask) -> subprocess.Popen[bytes]:
        """Return a process for a task: the one there is, if it lives and fits."""
        kind = (task.program, task.threads)
        if self._process and self._process.poll() is None and self._kind == kind:
            return self._process
        self.close()
        self._process = start_process(task, task.log, self.gpu)
        self._kind = kind
        return self._process


def start_process(task: WorkerTask, log: Path, gpu: str) -> subprocess.Popen[bytes]:
    """Return a new process of the program of a task, which writes its errors to the end of ``log``."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", task.program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            start_new_session=True,  # the terminal's own interrupt must not reach it beside ours
        )


def parse_report(line: bytes) -> dict[str, Any] | None:
    """Return the report in a line; None for what a library printed before the first task."""
    with suppress(ValueError):
        report = json.loads(line)
        if isinstance(report, dict) and "report" in report:
            return report
    return None


def explain_end(log: Path, before: int, status: int) -> Report:
    """Return the report of a process that ended in the middle of a task, by what it wrote after so many bytes."""
    if status in INTERRUPTED:
        return {"report": "interrupted"}
    if status < 0:
        return failure(f"killed by {_signal_name(-status)}")
    text = log.read_bytes()[before:].decode(errors="replace") if log.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()]
    return failure(lines[-1].removeprefix("dvar: ") if lines else f"ended with status {status} and said nothing")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have no name
        return f"signal {number}"
