"""The loss on a held batch, measured so that training never notices."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvar.errors import RefusedInput

Held = TypeVar("Held")


class Probe(Generic[Held]):
    """L_det: the loss on inputs that were drawn once and are held for the whole run.

    `loss(held)` gives the losses of the held samples, [B] in float32 or float64; `modules` are all modules it runs
    through.  Calling the probe returns these losses as a float32 tensor [B] on the CPU, without gradient.  They are
    computed in evaluation mode; afterwards every submodule has its own train or eval flag again and every global
    random generator (Python, NumPy, PyTorch on CPU and CUDA) the state it had, also when `loss` raises.

    Raises: RefusedInput when a module is wrapped for data parallel training (pass what it wraps, `wrapper.module`), and
    on a call when the losses have another shape or less precision.
    Source: Section 3.2, Equation 4: the batch is drawn once and only the model changes.
    Deviates: always in evaluation mode; the released code leaves the modules that it trains in training mode.
    """

    def __init__(self, loss: Callable[[Held], Tensor], held: Held, modules: Iterable[nn.Module]) -> None:
        self._loss, self._held, self._modules = loss, held, tuple(modules)
        problems = [
            f"a probe must not run the data parallel wrapper, got {type(module).__name__}: pass its `.module`"
            for module in self._modules
            if isinstance(module, DistributedDataParallel)
        ]
        if problems:
            raise RefusedInput(problems)

    def __call__(self) -> Tensor:
        with undisturbed(self._modules), torch.no_grad():
            losses = self._loss(self._held)
            return _checked(losses).detach().to("cpu", torch.float32)


@contextmanager
def undisturbed(modules: Iterable[nn.Module]) -> Iterator[None]:
    """A scope in evaluation mode that leaves no trace: flags and global random states are afterwards what they were."""
    with _random_states_kept(), _evaluation_mode(modules):
        yield


def _checked(losses: Tensor) -> Tensor:
    problems = []
    if losses.ndim != 1 or not losses.numel():
        problems.append(
            f"a probe's loss must give one number per held sample, got the shape {tuple(losses.shape)}: "
            "average over the other dimensions only"
        )
    if losses.dtype not in (torch.float32, torch.float64):
        problems.append(
            f"a probe's losses must be float32 or float64, got {losses.dtype}: "
            "call `.float()` on prediction and target before comparing them"
        )
    if problems:
        raise RefusedInput(problems)
    return losses


@contextmanager
def _evaluation_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in flags:
            # Set rather than call `eval()`: some adapters merge their weights when that is called.
            part.training = False
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def _random_states_kept() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Before CUDA is first used there is no state to keep, and asking for one would start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
