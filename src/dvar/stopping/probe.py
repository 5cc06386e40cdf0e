"""The loss on a held batch, measured so that training never notices."""

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
    """L_det: the loss on inputs that were drawn once and are held for the whole run.

    `loss(held)` gives the losses of the held samples, [B] in float32 or float64.  Calling the probe returns these
    losses as a float32 tensor [B] on the CPU, without gradient; before the first step too, where they are the untouched
    model's.  They are computed in evaluation mode and under the global random generators (Python, NumPy, PyTorch on CPU
    and CUDA) seeded with `seed`, so that a loss which draws its own noise draws the same one each time.  Afterwards
    every submodule has its own train or eval flag again and every generator the state it had, also when `loss` raises.

    `modules` are all modules that the loss runs through.  Without them, those that `loss` itself holds are taken: a
    module, the object of a bound method, arguments of a partial, what a function closes over or finds by a global name.

    Raises: RefusedInput when no module is given and none found, when one is wrapped for data parallel training (pass
    what it wraps, `wrapper.module`), and on a call when the losses have another shape or less precision.
    Source: Section 3.2, Equation 4: the batch is drawn once and only the model changes.
    Deviates: always in evaluation mode; the released code leaves the modules that it trains in training mode.
    """

    def __init__(
        self, loss: Callable[[Held], Tensor], held: Held, modules: Iterable[nn.Module] | None = None, *, seed: int = 0
    ) -> None:
        self._loss, self._held, self._seed = loss, held, seed
        self._modules = _checked_modules(modules, loss)

    @classmethod
    def capture(
        cls,
        loss: Callable[[Held], Tensor],
        draw: Callable[[], Held],
        modules: Iterable[nn.Module] | None = None,
        *,
        seed: int = 0,
    ) -> Probe[Held]:
        """The probe that holds what `draw()` returns now: a batch of any loader or function, noise and all.

        It is drawn once, under global generators seeded with `seed` and put back afterwards.  Its tensors, also those
        in dicts, lists and tuples, are detached copies, which no later change in place can reach.
        """
        with _random_states_kept(seed):
            held = _copied(draw())
        return cls(loss, held, modules, seed=seed)

    def __call__(self) -> Tensor:
        with undisturbed(self._modules, self._seed), torch.no_grad():
            return _checked(self._loss(self._held)).detach().to("cpu", torch.float32)

    @property
    def header(self) -> dict[str, Any]:
        """For `Trace(probe.header)`: the held timesteps, where the batch has them under that name; else nothing."""
        timesteps = _timesteps(self._held)
        return {} if timesteps is None else {"timesteps": timesteps}


class PairedProbe(Generic[Held]):
    """The gain over the frozen model on fresh draws: the loss minus the frozen model's loss on the very same draws.

    `draw(step)` returns the draws of a step, timesteps included; `loss(draws)` and `frozen(draws)` give the losses of
    their samples, [B] in float32 or float64, by the model in training and by one that never changes (a copy, or the
    same with its adapter switched off).  Calling the probe with a step returns their difference as a float32 tensor [B]
    on the CPU, without gradient: 0 before the first update, negative as the model learns.  What any of the three draws
    from the global generators is keyed by (`seed`, step), so a step measured again after a resume gives the same.
    Train and eval flags and all global generators are afterwards what they were.

    Most of the loss's noise is common to both models and cancels, so unseen draws can be used at every step.  The
    values may be negative: `Hall` and `EmaPercentile` cannot read them.

    Raises: RefusedInput as `Probe` does; `modules` left out are sought on `loss` and on `frozen`.
    Source: none; Section 4.5 finds that a loss with fresh timesteps tells nothing by itself.
    """

    header: Mapping[str, Any] = {"reading": "paired"}
    """For `Trace(probe.header)`: a trace so marked refuses to be normalised by its first values."""

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
        self._modules = _checked_modules(modules, loss, frozen)

    def __call__(self, step: int) -> Tensor:
        return self.measure(step)["eval"]

    def measure(self, step: int) -> dict[str, Any]:
        """What `trace.record(step, **probe.measure(step))` takes: `eval`, and `timesteps` where the draws have them."""
        now, before, timesteps = self.both(step)
        losses = (now - before).to(torch.float32)
        return {"eval": losses} if timesteps is None else {"eval": losses, "timesteps": timesteps}

    def both(self, step: int) -> tuple[Tensor, Tensor, list[int] | None]:
        """The two losses, of the model in training and of the frozen one: float64 [B] on the CPU; and the timesteps."""
        key = int(np.random.SeedSequence((self._seed, step)).generate_state(1, np.uint32)[0])
        with undisturbed(self._modules, key), torch.no_grad():
            draws = self._draw(step)
        # The same key again, so that noise drawn inside the loss is common to both models as well.
        now, before = (self._measured(loss, draws, key) for loss in (self._loss, self._frozen))
        if now.shape != before.shape:
            raise RefusedInput(
                f"a paired probe's losses must be as many by both models, got {len(now)} and {len(before)} in training "
                "and frozen: give both one number per sample of the same draws"
            )
        return now, before, _timesteps(draws)

    def _measured(self, loss: Callable[[Held], Tensor], draws: Held, key: int) -> Tensor:
        with undisturbed(self._modules, key), torch.no_grad():
            return _checked(loss(draws)).detach().to("cpu", torch.float64)


def stratified_timesteps(count: int, timesteps: int, generator: torch.Generator | None = None) -> Tensor:
    """`count` timesteps, int64 [count] on the CPU in rising order: a uniform one from each of as many equal strata.

    Each is uniform over its part of 0 .. `timesteps` - 1, and a timestep drawn at random from the result is uniform
    over all.  A small batch then covers early and late timesteps alike, which independent draws need not.

    Raises: RefusedInput when either is less than 1.
    Source: none; Section 2.2 draws t independently, and so does every default of ours.
    """
    if count < 1 or timesteps < 1:
        raise RefusedInput([f"count and timesteps must be 1 or more, got {count} and {timesteps}"])
    places = (torch.arange(count) + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return (places * timesteps).long().clamp(max=timesteps - 1)


@contextmanager
def undisturbed(modules: Iterable[nn.Module], seed: int | None = None) -> Iterator[None]:
    """A scope in evaluation mode that leaves no trace: flags and global random states are afterwards what they were.

    Inside it the generators are seeded with `seed`, if one is given.
    """
    with _random_states_kept(seed), _evaluation_mode(modules):
        yield


def _checked_modules(modules: Iterable[nn.Module] | None, *losses: object) -> tuple[nn.Module, ...]:
    given = tuple(modules or ()) or tuple(dict.fromkeys(module for loss in losses for module in _held_by(loss)))
    problems = [
        f"a probe must not run the data parallel wrapper, got {type(module).__name__}: pass its `.module`"
        for module in given
        if isinstance(module, DistributedDataParallel)
    ]
    if not given:
        problems.append(
            "a probe must know the modules that its loss runs through, got none and found none on the loss: "
            "pass modules=[...], or they would be measured in training mode"
        )
    if problems:
        raise RefusedInput(problems)
    return given


def _held_by(loss: Any) -> Iterator[nn.Module]:
    """The modules that a callable holds itself or in its own attributes; what those hold is theirs."""
    if isinstance(loss, nn.Module):
        yield loss
    elif isinstance(loss, functools.partial):
        for part in (loss.func, *loss.args, *loss.keywords.values()):
            yield from _held_by(part)
    elif inspect.ismethod(loss):
        yield from _held_by(loss.__self__)
    elif inspect.isfunction(loss):
        seen = inspect.getclosurevars(loss)
        for part in (*seen.nonlocals.values(), *seen.globals.values()):
            if isinstance(part, nn.Module):
                yield part
    elif hasattr(loss, "__dict__") and not isinstance(loss, type):
        yield from (part for part in vars(loss).values() if isinstance(part, nn.Module))


def _timesteps(draws: Any) -> list[int] | None:
    found = draws.get("timesteps") if isinstance(draws, Mapping) else getattr(draws, "timesteps", None)
    return None if found is None else [int(timestep) for timestep in found]


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_copied, value))
    if isinstance(value, list | tuple):
        return type(value)(_copied(item) for item in value)
    return value


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
def _random_states_kept(seed: int | None = None) -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Before CUDA is first used there is no state to keep, and asking for one would start it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        if seed is not None:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            # Not `torch.manual_seed`: before CUDA is first used, that would also decide how it starts.
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed_all(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)
