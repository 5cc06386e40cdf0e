"""Work in processes of their own, several at once: each has a place, a log, and a reason where it failed."""

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

Name = TypeVar("Name")


@dataclass(frozen=True)
class WorkerTask:
    """What one process does: a module of this library, run with one argument; what it says goes to ``log``."""

    module: str
    argument: str
    log: Path
    threads: int = 1


def slots(workers: int | None, threads: int) -> list[str]:
    """Return a place for each process under way: the GPU that it may see, or "" for the CPU.

    Without ``workers``: one a GPU, else as many as there are cores for.
    """
    gpus = [str(number) for number in range(torch.cuda.device_count())]
    count = workers or len(gpus) or max(1, len(os.sched_getaffinity(0)) // threads)
    return [gpus[number % len(gpus)] if gpus else "" for number in range(count)]


def side_by_side(
    work: Mapping[Name, WorkerTask], places: Sequence[str], every: float = 60
) -> Generator[tuple[dict[Name, str], list[Name]]]:
    """Do the work, one process a place.

    Yields, whenever some have ended and every ``every`` seconds, those that ended since, with why they failed, and
    those under way; one that was asked to stop has not failed.  Closed early, it asks each of these to stop, starts no
    more, and waits for them.  Meanwhile SIGTERM and the end of the terminal interrupt as Ctrl-C does, where they would
    end this process: its own would go on without it.
    """
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for place in places:
        free.put(place)
    running: dict[Name, subprocess.Popen[bytes]] = {}

    def done(name: Name) -> str:
        place = free.get()
        try:
            return _done(work[name], place, lambda process: running.update({name: process}))
        finally:
            running.pop(name, None)
            free.put(place)

    with _interrupted_by_the_end(), ThreadPoolExecutor(len(places)) as pool:
        futures = {pool.submit(done, name): name for name in work}
        left: set[Future[str]] = set(futures)
        try:
            while left:
                ended, left = wait(left, timeout=every, return_when=FIRST_COMPLETED)
                yield {futures[future]: future.result() for future in ended}, list(running)
        except BaseException:
            for future in left:
                future.cancel()
            for process in list(running.values()):
                process.send_signal(signal.SIGTERM)
            raise


@contextmanager
def _interrupted_by_the_end() -> Iterator[None]:
    """Raise KeyboardInterrupt at a signal that is not handled and would end this process.  Main thread only."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    ends = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]  # Windows has no terminal to lose
    ending = [number for number in ends if main and signal.getsignal(number) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _done(work: WorkerTask, place: str, started: Callable[[subprocess.Popen[bytes]], None]) -> str:
    """Do one piece of work and return why it failed, "" where it did not."""
    work.log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(work.threads), "TOKENIZERS_PARALLELISM": "false"}
    if place:
        environment["CUDA_VISIBLE_DEVICES"] = place
    with work.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", work.module, work.argument],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # the terminal's own interrupt must not reach it beside ours
        )
        started(process)
        status = process.wait()
    asked_to_stop = status in (130, -signal.SIGTERM)
    return _reason(work.log, status) if status and not asked_to_stop else ""


def _reason(log: Path, status: int) -> str:
    """Why a process ended: what it said last, or what killed it."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("dvar: ") if lines else f"ended with status {status} and said nothing"
