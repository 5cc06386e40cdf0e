"""Training as a generator of records: evaluate, judge, then step; everything else consumes what it yields."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from dvar.config.training import TrainingConfig
from dvar.diffusion.randomness import seeded_globals
from dvar.diffusion.sampling import Abandoned
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.training.checkpoint import Checkpoint
from dvar.training.optimizers import kept, optimizer_of, put_back, sharpened

Losses = Callable[[int, int, int], Tensor]
"""(step, first sample, count) -> the loss of each of these samples of the step, float32 [count], with its graph."""


class TrainableMethod(Protocol):
    """What the loop asks of a way to personalise: what is trained, and a copy of it to keep."""

    @property
    def parameters(self) -> list[nn.Parameter]: ...
    @property
    def state(self) -> dict[str, Tensor]: ...
    def load(self, state: Mapping[str, Tensor]) -> None: ...


@dataclass(frozen=True)
class StepRecord:
    """The model after ``step`` updates.

    ``train_loss``, ``grad_norm`` and ``lr`` are those of the last update, None at step 0; the loss was taken before
    it moved the model.  ``eval`` holds the losses of the held samples, None between two evaluations.  ``seconds``,
    since the step before: "train", "probe", "other" (what the consumers and the disk took), and what more was timed.
    """

    step: int
    train_loss: float | None
    eval: tuple[float, ...] | None
    verdict: Verdict
    grad_norm: float | None
    lr: float | None
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Update:
    """What one update saw; ``taken`` is False when its loss or gradient was not finite, and then nothing moved."""

    train_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    taken: bool = True


def train(
    learner: Learner,
    *,
    losses: Losses,
    probe: Callable[[], Tensor],
    criterion: Rule,
    log: Callable[[Mapping[str, Any]], None],
    save: Callable[[], None],
    interrupted: Callable[[], bool] = lambda: False,
    series: Series | None = None,
) -> Iterator[StepRecord]:
    """Yield a `StepRecord` for the untouched model and one after each update, until a verdict stops.

    An evaluation is made at every ``probe_every``-th step and at the cap, so that N updates give N + 1 of them at
    cadence 1.  Before a step is yielded its record is with ``log``, and every ``checkpointing_steps`` and at the last
    one ``save`` is called: whoever breaks out leaves a run that can go on.  A learner whose trace already holds records
    goes on after the last one.  A loss that is not finite stops, and neither moves the model nor is saved.
    ``interrupted`` stops after the step it finds under way, and that step is saved; between two forward passes of an
    update it gives the update up, and saves the step before, which was the last to be yielded.  What ``series`` returns
    goes into the record of its step, and what it times there into its seconds; it must leave the model as it finds it,
    and raises Abandoned where it was interrupted itself: the record then stands without it.

    Source: Section 3.2 and Figure 10.
    Deviates: the untouched model is evaluated too; the released code evaluates before each update and so never after
    the last.
    """
    config, trace, watch = learner.config, learner.trace, Stopwatch()
    if len(trace) and criterion(trace).stop:
        return
    for step in range(learner.next_step, config.max_train_steps + 1):
        with watch("train"):
            try:
                update = learner.update(losses, step, interrupted) if step else Update()
            except Abandoned:
                save()
                return
        due = step % config.probe_every == 0 or step == config.max_train_steps
        with watch("probe"):
            held = probe() if due and update.taken else None
        try:
            more = series(step, watch) if series and update.taken else {}
        except Abandoned:
            more = {}
        seen: dict[str, Any] = {
            "train_loss": update.train_loss,
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "seconds": watch.lap(),
        }
        record = trace.record(step, held, **seen, **more)
        log(record)
        finite = update.taken and (held is None or bool(held.isfinite().all()))
        verdict = _judge(criterion(trace), step, finite, interrupted())
        learner.keep_best()
        if verdict.reason is not Reason.NON_FINITE and (verdict.stop or step % config.checkpointing_steps == 0):
            save()
        yield StepRecord(step, eval=None if held is None else tuple(record["eval"]), verdict=verdict, **seen)
        if verdict.stop:
            return


class Learner:
    """Everything that moves in training: what the method learns, the optimizer, the trace and the best step so far."""

    def __init__(self, method: TrainableMethod, config: TrainingConfig, header: Mapping[str, Any]) -> None:
        self.method, self.config, self.trace = method, config, Trace(header)
        self.best_step, self.best = 0, method.state
        self.optimizer = optimizer_of(config, method.parameters)
        self.scaler = torch.amp.GradScaler(method.parameters[0].device.type, enabled=config.mixed_precision == "fp16")
        self._pace = _pace(config)

    @property
    def next_step(self) -> int:
        """The step whose record comes next."""
        return self.trace.last_step + 1 if len(self.trace) else 0

    def update(self, losses: Losses, step: int, interrupted: Callable[[], bool] = lambda: False) -> Update:
        """Make update number ``step``; return its loss, the mean over its samples, its gradient's norm and its rate.

        Under SAM the norm is that of the gradient it steps by, at the steeper point, and the loss is the one before.

        Raises: Abandoned when ``interrupted`` says so between two of its forward passes; then nothing moved.
        """
        config = self.config
        mean = self._gradient(losses, step, interrupted)
        if config.optimizer == "sam":
            with sharpened(self.method.parameters, config.sam_rho):
                self._gradient(losses, step, interrupted)
        self.scaler.unscale_(self.optimizer)
        gradients = [grad for part in self.method.parameters if (grad := part.grad) is not None]
        # Both leave the device at once: each wait for it would let it run dry.
        loss, norm = torch.stack([mean, nn.utils.get_total_norm(gradients).double()]).tolist()
        rate = config.learning_rate * self._pace(step - 1)
        # A gradient that overflows fp16 is the scaler's to skip and to scale down; anywhere else it is a fault.
        sound = math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled())
        if sound:
            if config.max_grad_norm is not None and math.isfinite(norm):
                nn.utils.clip_grads_with_norm_(self.method.parameters, config.max_grad_norm, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Update(loss, norm, rate, taken=sound)

    def _gradient(self, losses: Losses, step: int, interrupted: Callable[[], bool]) -> Tensor:
        """The mean loss of the samples of a step, float64 on their device; the parameters then hold its gradient.

        The samples of a step are numbered through its accumulation, so splitting it differently draws the same ones.
        """
        config, parts = self.config, self.config.gradient_accumulation_steps
        seen = []
        self.optimizer.zero_grad()
        for first in range(0, parts * config.train_batch_size, config.train_batch_size):
            if first and interrupted():
                raise Abandoned
            with seeded_globals(config.seed, "dropout", step, first):
                found = losses(step, first, config.train_batch_size)
                self.scaler.scale(found.mean() / parts).backward()
            seen.append(found.detach())
        return torch.cat(seen).double().mean()

    @property
    def best_by(self) -> str:
        """What the best step so far was judged by: L_det, while no trained step has the score that it is to be."""
        scored = self.config.best_by != "clip" or len(self._scores()[0])
        return self.config.best_by if scored else "l_det"

    def _scores(self) -> tuple[Any, Any]:
        """The steps that have a score, and the scores; that of the untouched model does not count."""
        steps, values = self.trace.metric("clip_image")
        return steps[steps > 0], values[steps > 0]

    def keep_best(self) -> None:
        """Copy what is learned if the newest record is the best so far, as ``best_by`` judges it."""
        by, trace = self.best_by, self.trace
        steps, values = self._scores() if by == "clip" else (trace.steps, trace.values)
        if not len(steps) or steps[-1] != trace.last_step or not math.isfinite(values[-1]):
            return
        before = values[:-1][np.isfinite(values[:-1])]
        best = {
            "l_det": values[-1] < before.min(initial=math.inf),
            "clip": values[-1] > before.max(initial=-math.inf),
            "stop": True,
        }
        if best[by]:
            self.best_step, self.best = trace.last_step, self.method.state

    def checkpoint(self, **facts: Any) -> Checkpoint:
        """Return all of it as a value, with ``facts`` that are to be found beside it."""
        tensors = {f"method/{name}": tensor for name, tensor in self.method.state.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        moments, moved = kept(self.optimizer)
        tensors |= {f"optimizer/{path}": tensor for path, tensor in moments.items()}
        facts |= {"best_step": self.best_step, "scaler": self.scaler.state_dict(), "optimizer": moved}
        return Checkpoint(self.trace.last_step, tensors, facts, self.trace)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Become what ``checkpoint`` returned; the settings must be those it was made under."""
        groups: dict[str, dict[str, Tensor]] = {"method": {}, "best": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            group, name = key.split("/", 1)
            groups[group][name] = tensor
        self.method.load(groups["method"])
        self.best_step, self.best = checkpoint.facts["best_step"], groups["best"]
        put_back(self.optimizer, groups["optimizer"], checkpoint.facts["optimizer"])
        self.scaler.load_state_dict(checkpoint.facts["scaler"])
        self.trace = checkpoint.trace


class Stopwatch:
    """Seconds by name since the last lap; what no name covers is "other"."""

    def __init__(self) -> None:
        self._started, self._spent = time.perf_counter(), {"train": 0.0, "probe": 0.0}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._spent[name] = self._spent.get(name, 0.0) + time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap, by name, and start the next."""
        now, spent = time.perf_counter(), self._spent
        lap = {**spent, "other": now - self._started - sum(spent.values())}
        self._started, self._spent = now, {"train": 0.0, "probe": 0.0}
        return lap


Series = Callable[[int, Stopwatch], Mapping[str, Any]]
"""A step's number and its stopwatch -> what else is to be recorded of the model after it: metrics by name."""


def _judge(verdict: Verdict, step: int, finite: bool, interrupted: bool) -> Verdict:
    """The rule's verdict, unless something else ends the run: a loss that is not finite, or a wish to stop."""
    if not finite:
        metrics = {**verdict.metrics, "non_finite_step": step}
        return replace(verdict, stop=True, reason=Reason.NON_FINITE, step=step, metrics=metrics)
    if interrupted:  # also where the rule stops: what follows a stop takes time, and is done when the run goes on
        return replace(verdict, stop=True, reason=Reason.INTERRUPTED, step=step)
    return verdict


def _pace(config: TrainingConfig) -> Callable[[int], float]:
    """The factor of the learning rate at each update, as diffusers names it: a function, so nothing to resume."""
    rate = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler, rate, num_warmup_steps=config.lr_warmup_steps, num_training_steps=config.max_train_steps
    )
    pace: Callable[[int], float] = schedule.lr_lambdas[0]
    return pace
