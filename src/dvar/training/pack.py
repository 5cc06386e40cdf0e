"""Packs: many runs whose samples share the forward passes of one frozen base model."""

# Each run keeps a backbone, an optimizer, a probe, a rule and a folder of its own, and is at a step of its own. It is a
# generator that yields requests (`dvar.training.requests`). A pack joins the samples that its runs ask for, lets each
# run's text encoders read its own captions, and calls the denoising network once: of a sum of losses, each run's
# parameters receive the gradient of their own.

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.devices import float32_arithmetic
from dvar.diffusion.objective import Draws, denoising_loss
from dvar.diffusion.randomness import seeded_globals
from dvar.errors import RefusedInput
from dvar.locks import lock_folder
from dvar.stopping.probe import Probe
from dvar.training.loop import StepRecord
from dvar.training.low_rank import Adapters, adapters_of, changed_by_rows
from dvar.training.pack_fit import pack_key, problems
from dvar.training.personalise import LoadBase, interruption, prepare, resource_errors, train_run
from dvar.training.preflight import launcher_problems
from dvar.training.requests import GradientRequest, HeldRequest, Request
from dvar.training.run import TrainingResult, TrainingRun

Consumers = Sequence[Callable[[StepRecord], None]]
End = TrainingResult | Exception


@dataclass
class _Slot:
    """A run of a pack, from its preparation on.

    Attributes:
        config: Its config.
        cancelled: Whether it alone is asked to stop.
        training: The run as a generator of requests.
        run: The run, once it is prepared.
        adapters: The layers of the denoising network that it adapts.
        request: What it has asked for; None when it has been answered.
        error: What kept it from being answered.
    """

    config: TrainingConfig
    cancelled: bool = False
    training: Generator[Request, None, TrainingResult] = field(init=False)
    run: TrainingRun = field(init=False)
    adapters: Adapters = field(default_factory=dict)
    request: Request | None = None
    error: Exception | None = None


@dataclass(frozen=True)
class _Batch:
    """The samples that a run has asked for.

    Attributes:
        slot: The run.
        draws: Their draws, one batch of each size of images.
        states: For each of these, what the text encoders give for its captions.
    """

    slot: _Slot
    draws: Sequence[Draws]
    states: Sequence[Mapping[str, States]]

    @property
    def shapes(self) -> list[torch.Size]:
        """The size of the latents of each of its draws."""
        return [part.noise.shape[1:] for part in self.draws]

    def rows(self, place: int = 0) -> int:
        """Return the samples in one of its draws."""
        return len(self.draws[place].timesteps)


class Pack:
    """Runs that train together, each as it would alone.

    All of them have one base model. What a run draws, decides and writes is its own, and the same as alone; its losses
    are equal but for the rounding of a larger batch. A run that breaks ends by itself, and leaves the others as they
    are.

    Args:
        load: Loads the base model of a config, as for `personalise`; its copies share their weights.
        interrupted: Whether all runs are asked to stop.
    """

    def __init__(self, load: LoadBase, interrupted: Callable[[], bool] = lambda: False) -> None:
        self._load, self._interrupted = load, interrupted
        self._slots: dict[str, _Slot] = {}
        self._base: Backbone | None = None

    def __len__(self) -> int:
        return len(self._slots)

    def fits(self, config: TrainingConfig) -> bool:
        """Return whether a run has the base model of those that are in the pack now; any run fits an empty one."""
        return all(pack_key(slot.config) == pack_key(config) for slot in self._slots.values())

    def add(self, name: str, config: TrainingConfig, consumers: Consumers = ()) -> None:
        """Let a run join, under a name that no other has.

        Raises:
            RefusedInput: It cannot share a forward pass, or not with those of the pack.
        """
        reasons = problems(config)
        if not self.fits(config):
            reasons.append("runs of a pack have one base model, precision and arithmetic, got others: add it later")
        if reasons:
            raise RefusedInput(reasons)
        if not self._slots:
            self._base = None
        slot = self._slots[name] = _Slot(config)
        slot.training = self._train(slot, consumers)

    def cancel(self, name: str) -> None:
        """Ask a run to save and end, if it is there; from any thread."""
        if slot := self._slots.get(name):
            slot.cancelled = True

    def advance(self) -> dict[str, End]:
        """Go on until a run ends, or each has the gradient of a part of its next update; return the ends by name.

        The end of a run that was asked to stop has the reason "interrupted"; that of one that broke is its exception.
        """
        slots = list(self._slots.values())
        tf32 = any(slot.config.allow_tf32 for slot in slots)
        with float32_arithmetic(tf32):
            ends = self._resume(slot for slot in slots if slot.request is None)
            while held := [slot for slot in self._slots.values() if isinstance(slot.request, HeldRequest)]:
                self._answer(held, self._answer_held)
                ends |= self._resume(held)
            if not ends:
                self._answer(list(self._slots.values()), self._answer_gradients)
        return ends

    def close(self) -> None:
        """Leave the runs as they are, to be resumed from their checkpoints."""
        for slot in self._slots.values():
            slot.training.close()
        self._slots.clear()

    @property
    def _shared(self) -> Backbone:
        """The base model whose denoising network serves all runs."""
        assert self._base
        return self._base

    def _train(self, slot: _Slot, consumers: Consumers) -> Generator[Request, None, TrainingResult]:
        """Prepare and train a run."""
        config = slot.config

        def stopping() -> Any:
            return nullcontext(lambda: slot.cancelled or self._interrupted())

        with resource_errors(config, packed=True), lock_folder(Path(config.output_dir).expanduser()):
            run, checkpoint = prepare(config, load=self._load)
            slot.run, slot.adapters = run, adapters_of(run.backbone.denoiser)
            if self._base is None:
                self._base = self._load(config)
            if run.backbone.digest != self._base.digest:
                rule = f"runs of a pack have one base model, and that of {config.output_dir} has changed since it began"
                raise RefusedInput(f"{rule}: train it without --pack")
            result: TrainingResult = yield from train_run(run, checkpoint, consumers, stopping)
            return result

    def _resume(self, slots: Iterable[_Slot]) -> dict[str, End]:
        """Let runs that have been answered go on until they ask again; return the ends of those that ended."""
        names, ends = {id(slot): name for name, slot in self._slots.items()}, dict[str, End]()
        for slot in slots:
            error, slot.error, slot.request = slot.error, None, None
            try:
                slot.request = slot.training.throw(error) if error else next(slot.training)
            except StopIteration as end:
                ends[names[id(slot)]] = end.value
            except Exception as broken:
                ends[names[id(slot)]] = broken
        for name in ends:
            del self._slots[name]
        return ends

    def _answer(self, slots: Sequence[_Slot], answer: Callable[[Sequence[_Slot]], None]) -> None:
        """Answer requests together; an error that is nobody's own is that of all."""
        try:
            answer(slots)
        except Exception as error:
            for slot in slots:
                slot.error = slot.error or error
        for slot in slots:
            slot.request = None

    def _answer_held(self, slots: Sequence[_Slot]) -> None:
        """Evaluate the held batches of several runs together, each as the probe of its run does."""
        counts = [sum(len(part.timesteps) for part in slot.run.held) for slot in slots]
        modules = [module for slot in slots for module in slot.run.backbone.modules]
        losses = Probe(self._held_losses, slots, [self._shared.denoiser, *modules])()
        for slot, own in zip(slots, torch.split(losses, counts), strict=True):
            if isinstance(slot.request, HeldRequest):
                slot.request.losses = own

    def _held_losses(self, slots: Sequence[_Slot]) -> Tensor:
        """Return the losses of the held samples of several runs, one run after another, float32 [n]."""
        batches = [_encode(slot, slot.run.held) for slot in slots]
        parts = [
            _Batch(batch.slot, [draws], [states])
            for batch in batches
            for draws, states in zip(batch.draws, batch.states, strict=True)
        ]
        losses: dict[int, Tensor] = {}
        for group in _group_by_size(parts):
            with self._changed_for(group):
                losses |= {id(part): own for part, own in zip(group, self._pass(group), strict=True)}
        return torch.cat([losses[id(part)] for part in parts])

    def _answer_gradients(self, slots: Sequence[_Slot]) -> None:
        """Leave the gradient that each run has asked for in its parameters."""
        batches = []
        for slot in slots:
            try:
                batches.append(_draw(slot))
            except Exception as error:  # of its own images or captions
                slot.error = error
        training = any(slot.run.backbone.denoiser.training for slot in slots)
        if training is not self._shared.denoiser.training:
            self._shared.denoiser.train(training)
        for group in _group_by_size(batches):
            with self._changed_for(group):  # in the backward pass too, which may compute the forward one again
                passes = [self._pass(group, place) for place in range(len(group[0].draws))]
                objectives = []
                for batch, *losses in zip(group, *passes, strict=True):
                    if isinstance(request := batch.slot.request, GradientRequest):
                        own = batch.slot.run.weigh(batch.draws, losses)
                        request.losses = own.detach()
                        objectives.append(request.objective(own))
                torch.autograd.backward(objectives)

    def _pass(self, group: Sequence[_Batch], place: int = 0) -> tuple[Tensor, ...]:
        """Return the losses of the samples of each batch, all of one size, by one pass of the denoising network."""
        base = self._shared
        all_states = [batch.states[place] for batch in group]
        states = {
            name: tuple(torch.cat(parts) for parts in zip(*(own[name] for own in all_states), strict=True))
            for name in all_states[0]
        }

        def predict(noisy: Tensor, times: Tensor, input_ids: Tensor) -> Tensor:
            with base.autocast():
                prediction: Tensor = base.denoise(noisy, times, states)
            return prediction

        draws = reduce(Draws.joined, [batch.draws[place] for batch in group])
        losses = denoising_loss(predict, draws, base.schedule)
        return tuple(torch.split(losses, [batch.rows(place) for batch in group]))

    def _changed_for(self, group: Sequence[_Batch]) -> AbstractContextManager[None]:
        """Return the scope in which the denoising network is each run's own for the samples of its batch."""
        return changed_by_rows(self._shared.denoiser, [(batch.slot.adapters, batch.rows()) for batch in group])


def _draw(slot: _Slot) -> _Batch:
    """Return the samples of the gradient that a run has asked for; its dropout is that of the run alone."""
    request, run = slot.request, slot.run
    assert isinstance(request, GradientRequest)
    with seeded_globals(slot.config.seed, "dropout", request.step, request.first):
        return _encode(slot, run.training_draws(request.step, request.first, request.count))


def _encode(slot: _Slot, draws: Sequence[Draws]) -> _Batch:
    """Return draws of a run with what its own text encoders give for their captions."""
    backbone = slot.run.backbone
    with backbone.autocast():
        return _Batch(slot, draws, [backbone.encode_captions(part.input_ids) for part in draws])


def _group_by_size(batches: Iterable[_Batch]) -> list[list[_Batch]]:
    """Return the batches in groups that have images of the same sizes."""
    groups: dict[str, list[_Batch]] = {}
    for batch in batches:
        groups.setdefault(str(batch.shapes), []).append(batch)
    return list(groups.values())


def personalise_many(
    configs: Iterable[TrainingConfig], size: int, *, load: LoadBase, consumers: Consumers = ()
) -> Iterator[tuple[str, End]]:
    """Learn the concept of each config, ``size`` of them at once in one pack, and yield (output_dir, its end).

    The runs are those of `personalise`, and so are their folders. One that ends gives its place to the next. What
    interrupts `personalise` ends all of them, each with a checkpoint to resume from.

    Args:
        configs: The config of each run, each with a folder of its own.
        size: Runs at once.
        load: Loads the base model of a config; its copies share their weights, as those of
            `dvar.jobs.base_models.BaseModels` do.
        consumers: Each is called with every `StepRecord` of every run.

    Raises:
        RefusedInput: A run cannot share a forward pass with others; every problem is named, before a model is loaded.
    """
    waiting = list(configs)
    reasons = launcher_problems(os.environ, "a pack")
    reasons += [f"{config.output_dir}: {problem}" for config in waiting for problem in problems(config)]
    if size < 1:
        reasons.append(f"a pack must have at least one run, got {size}: give another size")
    if reasons:
        raise RefusedInput(reasons)
    return _personalise_many(waiting, size, load, consumers)


def _personalise_many(
    waiting: list[TrainingConfig], size: int, load: LoadBase, consumers: Consumers
) -> Iterator[tuple[str, End]]:
    with interruption() as interrupted, closing(Pack(load, interrupted)) as pack:
        while len(pack) or (waiting and not interrupted()):
            while waiting and len(pack) < size and pack.fits(waiting[0]) and not interrupted():
                config = waiting.pop(0)
                pack.add(config.output_dir, config, consumers)
            yield from pack.advance().items()
