"""The processes that train one run together."""

# Draws are keyed by the number of a sample in its step, so whoever computes it, a sample is the same.  The samples of a
# step are shared out, gradients are summed, and one process, the main one, measures, judges and writes.

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dvar.errors import ProcessLost
from dvar.stopping.diagnosis import Reason
from dvar.stopping.gloo_exit import wait_for_gloo
from dvar.stopping.verdict import Verdict

BEAT_SECONDS, LOST_SECONDS = 2.0, 30.0
"""Seconds between two signs of life of a process, and seconds without one after which it counts as lost."""
PATIENCE = timedelta(hours=24)
"""How long a process waits for the others: the main one generates images meanwhile. Signs of life end a vain wait."""
_REASONS = tuple(Reason)


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: The number of this one; 0 is the main process.
        count: How many there are.
        store: Text that all of them read, by key; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    store: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that measures, judges and writes."""
        return self.rank == 0

    def share(self, samples: int, at_once: int) -> list[range]:
        """Return the samples of a step that this process computes, in parts of ``at_once`` or fewer."""
        each = samples // self.count
        first, last = self.rank * each, (self.rank + 1) * each
        return [range(start, min(start + at_once, last)) for start in range(first, last, at_once)]

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """Replace gradients by their sums over all processes."""
        if self.count == 1:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        with _losses_of_processes():
            dist.all_reduce(flat)
        first = 0
        for gradient in gradients:
            gradient.copy_(flat[first : first + gradient.numel()].view_as(gradient))
            first += gradient.numel()

    def gather(self, losses: Tensor) -> Tensor:
        """Return the losses of all samples of a step, in their order, from those of each process, [n]."""
        if self.count == 1:
            return losses
        parts = [torch.empty_like(losses) for _ in range(self.count)]
        with _losses_of_processes():
            dist.all_gather(parts, losses.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on some process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), device=device)
        with _losses_of_processes():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)

    def agree(self, verdict: Verdict, device: torch.device) -> Verdict:
        """Return the answer and the reason of the main process's verdict, on every process."""
        if self.count == 1:
            return verdict
        answer = torch.tensor([int(verdict.stop), _REASONS.index(verdict.reason)], device=device)
        with _losses_of_processes():
            dist.broadcast(answer, src=0)
        stop, reason = answer.tolist()
        return replace(verdict, stop=bool(stop), reason=_REASONS[reason])

    def publish(self, key: str, text: str) -> None:
        """Let the others read a text of the main process."""
        if self.count > 1:
            self.store.set(key, text)

    def read(self, key: str) -> str:
        """Return what the main process has published, or will have."""
        with _losses_of_processes():
            return bytes(self.store.get(key)).decode()


ALONE = Processes()


@contextmanager
def launched_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Yield the processes that a launcher has started, as it says in the environment, or this one alone.

    While they are open, a process that dies or hangs ends the others with a message.

    Raises:
        ProcessLost: Another process has ended.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    rank, device = int(environment["RANK"]), _own_device(environment)
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store.set_timeout(PATIENCE)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    watch = _Watch(rank, count, environment)
    try:
        yield Processes(rank, count, dist.PrefixStore("dvar", store))  # type: ignore[attr-defined]
        wait_for_gloo()
        dist.destroy_process_group()  # after an error it might wait for a process that is lost
    finally:
        watch.end()


def _own_device(environment: Mapping[str, str]) -> torch.device:
    """Return the device of this process, which becomes the current one."""
    if not torch.cuda.is_available() or environment.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return torch.device("cpu")
    device = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


@contextmanager
def _losses_of_processes() -> Iterator[None]:
    """Turn the errors of talking to the other processes into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLost(_lost("another process of this run")) from error


def _lost(which: str) -> str:
    return f"{which} has ended or hangs: see what it printed, then go on with --resume_from_checkpoint latest"


class _Watch:
    """A thread that says that this process lives, and ends it when another one no longer does.

    A process that is lost leaves the others waiting, under NCCL without an error; and only another thread can end a
    wait.
    """

    def __init__(self, rank: int, count: int, environment: Mapping[str, str]) -> None:
        self.rank, self.others = rank, [number for number in range(count) if number != rank]
        address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        lost = timedelta(seconds=LOST_SECONDS)
        self._store = dist.TCPStore(address, port, is_master=False, timeout=lost)  # type: ignore[attr-defined]
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Say that this process ends on purpose."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        beats, seen = 0, {number: (b"", time.monotonic()) for number in self.others}
        while True:
            ended = self._ended.wait(BEAT_SECONDS)
            beats += 1
            try:
                self._store.set(f"alive/{self.rank}", "ended" if ended else str(beats))
                if ended:
                    return
                for number in self.others:
                    beat = self._store.get(f"alive/{number}")
                    if beat == b"ended" or beat != seen[number][0]:
                        seen[number] = (beat, time.monotonic())
            except RuntimeError:  # the store ended with the process that held it, or a process never began
                if ended or self._ended.wait(BEAT_SECONDS):
                    return
                self._leave("the main process of this run")
            late = [number for number, (_, when) in seen.items() if time.monotonic() - when > LOST_SECONDS]
            if late:
                self._leave(f"process {late[0]} of this run")

    def _leave(self, which: str) -> None:
        print(f"dvar: {_lost(which)}", file=sys.stderr, flush=True)
        os._exit(1)
