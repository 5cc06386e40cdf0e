"""The processes that train one run together."""

# Draws are keyed by the number of a sample in its step, so whoever computes it, a sample is the same.  The samples of a
# step are shared out, gradients are summed, and one process, the main one, measures, judges and writes.  The others do
# what it calls for, in its order: so what depends on files or on a verdict is decided once.

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dvar.diffusion.devices import best_device
from dvar.errors import ProcessLost
from dvar.stopping.gloo_exit import wait_for_gloo
from dvar.training.shard_fit import is_sharded

BEAT_SECONDS, LOST_SECONDS = 2.0, 30.0
"""Seconds between two signs of life of a process, and seconds without one after which it counts as lost."""
PATIENCE = timedelta(hours=24)
"""How long a process waits for the others: the main one generates images meanwhile. Signs of life end a vain wait."""
_END = "end"


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them.

    Attributes:
        rank: The number of this one; 0 is the main process.
        count: How many there are.
        store: Text that all of them read, by key; None where there is one process.
        sharded: Whether each holds only a part of the base model, so that all make each of its forward passes.
    """

    rank: int = 0
    count: int = 1
    store: Any = None
    sharded: bool = False
    _calls: Iterator[int] = field(default_factory=itertools.count, repr=False, compare=False)

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

    def call(self, work: str, **arguments: Any) -> None:
        """Have the other processes do a work too that all do together; the main process calls, then does its own part.

        Args:
            work: Its name among those that the others `serve`.
            arguments: Its arguments, plain JSON.
        """
        if self.count > 1:
            with _losses_of_processes():
                self.store.set(f"call/{next(self._calls)}", json.dumps([work, arguments]))

    def call_for_pass(self, work: str, **arguments: Any) -> None:
        """Call for a work of forward passes alone, which the others make only where the base model is sharded."""
        if self.sharded:
            self.call(work, **arguments)

    def end_calls(self, **facts: Any) -> None:
        """Let the other processes go on with what `serve` returns to them, plain JSON."""
        self.call(_END, **facts)

    def serve(self, works: Mapping[str, Callable[..., Any]]) -> dict[str, Any]:
        """Do what the main process calls for until it ends its calls, and return the facts that it ends them with."""
        while True:
            with _losses_of_processes():
                call = self.store.get(f"call/{next(self._calls)}")
            work, arguments = json.loads(call)
            if work == _END:
                facts: dict[str, Any] = arguments
                return facts
            works[work](**arguments)


ALONE = Processes()


@contextmanager
def launched_processes(environment: Mapping[str, str] = os.environ) -> Iterator[Processes]:
    """Yield the processes that a launcher has started, as it says in the environment, or this one alone.

    While they are open, a process that dies or hangs ends the others with a message. Where the launcher asks for FSDP,
    they are to shard the base model.

    Raises:
        ProcessLost: Another process has ended.
    """
    count = int(environment.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    rank, device, sharded = int(environment["RANK"]), _own_device(environment), is_sharded(environment)
    # With it transformers would leave a text encoder without weights on all processes but the first.
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
    store.set_timeout(PATIENCE)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count)
    watch = _Watch(rank, count, environment)
    try:
        with _losses_within_passes():
            yield Processes(rank, count, dist.PrefixStore("dvar", store), sharded)  # type: ignore[attr-defined]
        wait_for_gloo()
        dist.destroy_process_group()  # after an error it might wait for a process that is lost
    finally:
        watch.end()


def _own_device(environment: Mapping[str, str]) -> torch.device:
    """Return the device of this process, which becomes the current one."""
    if best_device() == "cpu":
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


@contextmanager
def _losses_within_passes() -> Iterator[None]:
    """Turn the errors of the collectives that a forward pass of a sharded model makes into `ProcessLost`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ProcessLost(_lost("another process of this run")) from error
        raise


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
