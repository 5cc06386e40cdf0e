"""Probes: the loss on a held batch, measured without disturbing training."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvar.errors import RefusedInput

Held = TypeVar("Held")


class Probe(Generic[Held]):
    """L_det: the loss on a batch that is drawn once and held for the whole run.

    Calling the probe returns the losses of the held samples as a float32 tensor [B] on the CPU, without gradient;
    before the first step they are those of the untouched model. They are computed in evaluation mode, with the global
    random generators (Python, NumPy, PyTorch on CPU and CUDA) seeded with ``seed``, so that a loss which draws its own
    noise draws the same noise each time. Afterwards every submodule has its own train or eval flag again and every
    generator its former state, also when ``loss`` raises.

    Args:
        loss: Returns the losses of the held samples, [B] in float32 or float64.
        held: The batch, passed to ``loss``.
        modules: All modules that the loss runs through. By default those that ``loss`` itself holds: a module, the
            object of a bound method, arguments of a partial, what a function closes over or finds by a global name.
        seed: Seed of the global generators during a measurement.

    Raises:
        RefusedInput: No module is given and none found, or one is wrapped for data parallel training (pass what it
            wraps, ``wrapper.module``); on a call, the losses have another shape or less precision.

    Source: Section 3.2, Equation 4: the batch is drawn once and only the model changes.
    Deviates: always in evaluation mode; the released code leaves the modules that it trains in training mode.
    """

    def __init__(
        self, loss: Callable[[Held], Tensor], held: Held, modules: Iterable[nn.Module] | None = None, *, seed: int = 0
    ) -> None:
        self._loss, self._held, self._seed = loss, held, seed
        self._modules = _collect_modules(modules, loss)

    @classmethod
    def capture(
        cls,
        loss: Callable[[Held], Tensor],
        draw: Callable[[], Held],
        modules: Iterable[nn.Module] | None = None,
        *,
        seed: int = 0,
    ) -> Probe[Held]:
        """Return a probe that holds what ``draw()`` returns now: a batch of any loader or function, with its noise.

        The batch is drawn once, with the global generators seeded with ``seed`` and restored afterwards. Its tensors,
        also those in dicts, lists and tuples, are copied and detached, so that no later change in place affects them.

        Args:
            loss: As for `Probe`.
            draw: Returns a batch.
            modules: As for `Probe`.
            seed: As for `Probe`; also that of the draw.
        """
        with _preserve_random_states(seed):
            held = _copy(draw())
        return cls(loss, held, modules, seed=seed)

    def __call__(self) -> Tensor:
        with preserve_state(self._modules, self._seed), torch.no_grad():
            return _validate_losses(self._loss(self._held)).detach().to("cpu", torch.float32)

    @property
    def header(self) -> dict[str, Any]:
        """Header for `Trace`: the held timesteps, where the batch has them under that name; else nothing."""
        timesteps = _get_timesteps(self._held)
        return {} if timesteps is None else {"timesteps": timesteps}


class PairedProbe(Generic[Held]):
    """The loss minus that of the frozen model, on the same fresh draws.

    Calling the probe with a step returns the differences as a float32 tensor [B] on the CPU, without gradient: 0 before
    the first update, negative as the model learns. Most of the noise of the loss is common to both models and cancels,
    so that fresh draws can be used at every step. The values may be negative: `Hall` and `EmaPercentile` cannot read
    them.

    Whatever is drawn from the global generators is keyed by (``seed``, step), so a step that is measured again after a
    resume gives the same values. Afterwards train and eval flags and all generators are as they were.

    Args:
        loss: Returns the losses of the samples by the model in training, [B] in float32 or float64.
        frozen: The same by a model that never changes: a copy, or the same model with its adapter switched off.
        draw: Returns the draws of a step, timesteps included.
        modules: As for `Probe`; by default those that ``loss`` and ``frozen`` hold.
        seed: Seed of the draws.

    Raises:
        RefusedInput: As `Probe`; or the two models give different numbers of losses.

    Source: none; Section 4.5 finds that a loss with fresh timesteps says nothing by itself.
    """

    header: Mapping[str, Any] = {"reading": "paired"}
    """Header for `Trace`: a trace with this mark refuses to be normalised by its first values."""

    def __init__(
        self,
        loss: Callable[[Held], Tensor],
        frozen: Callable[[Held], Tensor],
        draw: Callable[[int], Held],
        modules: Iterable[nn.Module] | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self._loss, self._frozen, self._draw, self._seed = loss, frozen, draw, seed
        self._modules = _collect_modules(modules, loss, frozen)

    def __call__(self, step: int) -> Tensor:
        now, before, _ = self.measure_both(step)
        return (now - before).to(torch.float32)

    def measure(self, step: int) -> dict[str, Any]:
        """Return the arguments of ``trace.record`` after the step: eval, and timesteps where the draws have them."""
        now, before, timesteps = self.measure_both(step)
        losses = (now - before).to(torch.float32)
        return {"eval": losses} if timesteps is None else {"eval": losses, "timesteps": timesteps}

    def measure_both(self, step: int) -> tuple[Tensor, Tensor, list[int] | None]:
        """Return the losses of the model in training, those of the frozen one, and the timesteps.

        The losses are float64, [B] on the CPU; the timesteps are None where the draws have none.
        """
        key = int(np.random.SeedSequence((self._seed, step)).generate_state(1, np.uint32)[0])
        with preserve_state(self._modules, key), torch.no_grad():
            draws = self._draw(step)
        # The same key again, so that noise drawn inside the loss is common to both models too.
        now, before = (self._compute_losses(loss, draws, key) for loss in (self._loss, self._frozen))
        if now.shape != before.shape:
            raise RefusedInput(
                f"a paired probe needs as many losses from both models, got {len(now)} and {len(before)} in training "
                "and frozen: give both one number per sample of the same draws"
            )
        return now, before, _get_timesteps(draws)

    def _compute_losses(self, loss: Callable[[Held], Tensor], draws: Held, key: int) -> Tensor:
        with preserve_state(self._modules, key), torch.no_grad():
            return _validate_losses(loss(draws)).detach().to("cpu", torch.float64)


def draw_stratified_timesteps(count: int, timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw timesteps in rising order, one uniformly from each of ``count`` equal strata.

    A timestep picked at random from the result is uniform over all. A small batch then covers early and late timesteps
    alike, which independent draws need not.

    Args:
        count: Number of timesteps.
        timesteps: Number of timesteps of the noise schedule.
        generator: Source of randomness; by default the global one.

    Returns:
        int64 [count] on the CPU, from 0 to ``timesteps`` - 1.

    Raises:
        RefusedInput: ``count`` or ``timesteps`` is less than 1.

    Source: none; Section 2.2 draws t independently, and so do all defaults here.
    """
    if count < 1 or timesteps < 1:
        raise RefusedInput([f"count and timesteps must be 1 or more, got {count} and {timesteps}: raise them"])
    positions = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return (positions * timesteps).long().clamp(max=timesteps - 1)


@contextmanager
def preserve_state(modules: Iterable[nn.Module], seed: int | None = None) -> Iterator[None]:
    """Yield in evaluation mode; afterwards flags of the modules and global random states are as they were.

    Args:
        modules: Modules to put into evaluation mode.
        seed: Seed of the global generators inside the scope; by default they go on.
    """
    with _preserve_random_states(seed), _evaluation_mode(modules):
        yield


def _collect_modules(modules: Iterable[nn.Module] | None, *losses: object) -> tuple[nn.Module, ...]:
    """Return ``modules``, or else those that the losses hold.

    Raises:
        RefusedInput: There is none, or one is wrapped for data parallel training.
    """
    collected = tuple(modules or ()) or tuple(
        dict.fromkeys(module for loss in losses for module in _iter_modules(loss))
    )
    problems = [
        f"a probe must not run the data parallel wrapper, got {type(module).__name__}: pass its `.module`"
        for module in collected
        if isinstance(module, DistributedDataParallel)
    ]
    if not collected:
        problems.append(
            "a probe must know the modules that its loss runs through, got none and found none on the loss: "
            "pass modules=[...], or they would be measured in training mode"
        )
    if problems:
        raise RefusedInput(problems)
    return collected


def _iter_modules(loss: Any) -> Iterator[nn.Module]:
    """Yield the modules that a callable is, or holds in its own attributes."""
    if isinstance(loss, nn.Module):
        yield loss
    elif isinstance(loss, functools.partial):
        for part in (loss.func, *loss.args, *loss.keywords.values()):
            yield from _iter_modules(part)
    elif inspect.ismethod(loss):
        yield from _iter_modules(loss.__self__)
    elif inspect.isfunction(loss):
        variables = inspect.getclosurevars(loss)
        for part in (*variables.nonlocals.values(), *variables.globals.values()):
            if isinstance(part, nn.Module):
                yield part
    elif hasattr(loss, "__dict__") and not isinstance(loss, type):
        yield from (part for part in vars(loss).values() if isinstance(part, nn.Module))


def _get_timesteps(draws: Any) -> list[int] | None:
    timesteps = draws.get("timesteps") if isinstance(draws, Mapping) else getattr(draws, "timesteps", None)
    return None if timesteps is None else [int(timestep) for timestep in timesteps]


def _copy(value: Any) -> Any:
    """Return a copy of ``value`` with all tensors copied and detached."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copy, value))
    if isinstance(value, list | tuple):
        return type(value)(_copy(item) for item in value)
    return value


def _validate_losses(losses: Tensor) -> Tensor:
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
    """Set all submodules to evaluation mode inside the scope, and restore the flag of each afterwards."""
    flags = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in flags:
            # The flag is set because some adapters merge their weights when `eval()` is called.
            part.training = False
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def _preserve_random_states(seed: int | None = None) -> Iterator[None]:
    """Seed the global generators inside the scope, if there is a seed, and restore their states afterwards."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerators = list(_iter_accelerators())
    states = [read() for read, _, _ in accelerators]
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # `torch.manual_seed` would also queue a seed for CUDA before it is first used.
            torch.default_generator.manual_seed(seed)
            for _, _, seed_all in accelerators:
                seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        for (_, restore, _), state in zip(accelerators, states, strict=True):
            restore(state)


def _iter_accelerators() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Callable[[int], None]]]:
    """Yield how the random state of each kind of accelerator in use is read, restored and seeded."""
    # Before CUDA or XPU is first used there is no state to preserve, and reading one would initialise it.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        yield torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all, torch.cuda.manual_seed_all
    if hasattr(torch, "xpu") and torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        yield torch.xpu.get_rng_state_all, torch.xpu.set_rng_state_all, torch.xpu.manual_seed_all
    if torch.backends.mps.is_available():
        yield torch.mps.get_rng_state, torch.mps.set_rng_state, torch.mps.manual_seed
