"""A pool of worker processes, each with a slot, a log and a reason where it failed."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

Key = TypeVar("Key")


@dataclass(frozen=True)
class WorkerTask:
    """The work of one process.

    Attributes:
        module: A module of this library, which is run with ``argument``.
        log: The file that its output goes to.
        threads: CPU threads of the process.
    """

    module: str
    argument: str
    log: Path
    threads: int = 1


def list_slots(workers: int | None, threads: int) -> list[str]:
    """Return a slot for each process that runs at once: the GPU that it may use, or "" for the CPU.

    Args:
        workers: Number of slots; by default one for each GPU, or else as many as there are cores for.
        threads: CPU threads of each process.
    """
    gpus = [str(number) for number in range(torch.cuda.device_count())]
    count = workers or len(gpus) or max(1, len(os.sched_getaffinity(0)) // threads)
    return [gpus[number % len(gpus)] if gpus else "" for number in range(count)]


def run_workers(
    tasks: Mapping[Key, WorkerTask], slots: Sequence[str], every: float = 60
) -> Generator[tuple[dict[Key, str], list[Key]]]:
    """Run tasks, one process in each slot.

    Closed early, it asks the running processes to stop, starts no more, and waits for them. Meanwhile SIGTERM and the
    end of the terminal interrupt as Ctrl-C does, where they would end this process: its workers would run on alone.

    Args:
        every: Seconds after which it yields even if no task has ended.

    Yields:
        The tasks that ended since, each with the reason why it failed or "", and the tasks that are running. A task
        that was asked to stop has not failed.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    running: dict[Key, subprocess.Popen[bytes]] = {}

    def run(key: Key) -> str:
        slot = free.get()
        try:
            return _run_task(tasks[key], slot, lambda process: running.update({key: process}))
        finally:
            running.pop(key, None)
            free.put(slot)

    with _signals_interrupt(), ThreadPoolExecutor(len(slots)) as pool:
        futures = {pool.submit(run, key): key for key in tasks}
        pending: set[Future[str]] = set(futures)
        try:
            while pending:
                ended, pending = wait(pending, timeout=every, return_when=FIRST_COMPLETED)
                yield {futures[future]: future.result() for future in ended}, list(running)
        except BaseException:
            for future in pending:
                future.cancel()
            for process in list(running.values()):
                process.send_signal(signal.SIGTERM)
            raise


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """Raise KeyboardInterrupt at a signal that has no handler and would end this process.  Main thread only."""

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


def _run_task(task: WorkerTask, slot: str, on_start: Callable[[subprocess.Popen[bytes]], None]) -> str:
    """Run one task and return why it failed, or ""."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
    if slot:
        environment["CUDA_VISIBLE_DEVICES"] = slot
    with task.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", task.module, task.argument],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # the terminal's own interrupt must not reach it beside ours
        )
        on_start(process)
        status = process.wait()
    asked_to_stop = status in (130, -signal.SIGTERM)
    return _failure_reason(task.log, status) if status and not asked_to_stop else ""


def _failure_reason(log: Path, status: int) -> str:
    """Return why a process ended: the last line that it wrote, or the signal that killed it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("dvar: ") if lines else f"ended with status {status} and said nothing"
