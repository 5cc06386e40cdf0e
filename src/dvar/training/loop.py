"""The training loop, as a generator of step records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
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
from dvar.training.methods.registry import TrainableMethod
from dvar.training.optimizers import load_state, make_optimizer, perturb, read_state
from dvar.training.processes import ALONE, Processes
from dvar.training.requests import GradientRequest, HeldRequest, Request, answer_requests, outcome_of

Losses = Callable[[int, int, int], Tensor]
"""(step, first sample, count) -> the loss of each of these samples of the step, float32 [count], with its graph."""


@dataclass(frozen=True)
class StepRecord:
    """The model after ``step`` updates.

    Attributes:
        step: Updates made.
        train_loss: The loss of the last update, before it moved the model; None at step 0.
        eval: The losses of the held samples; None between two evaluations.
        verdict: The verdict on the trace so far.
        grad_norm: The norm of the last update's gradient; None at step 0.
        lr: The learning rate of the last update; None at step 0.
        seconds: Seconds since the step before: "train", "probe", "other" (consumers and disk), and what else was timed.
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
    """One update; ``taken`` is False when its loss or gradient was not finite, and then nothing moved."""

    train_loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    taken: bool = True


def train(
    learner: Learner,
    *,
    losses: Losses,
    probe: Callable[[], Tensor],
    rule: Rule,
    log: Callable[[Mapping[str, Any]], None],
    save: Callable[[], None],
    interrupted: Callable[[], bool] = lambda: False,
    series: Series | None = None,
) -> Iterator[StepRecord]:
    """Yield a `StepRecord` for the untouched model and one after each update, until a verdict stops.

    It is `training_loop` with each request answered by a forward pass of its own.

    Args:
        learner: What is trained; with records in its trace, training resumes after the last one.
        losses: The training losses of samples of a step.
        probe: Evaluates the losses of the held samples, float32 [B].
        rule: As for `training_loop`; so are ``log``, ``save``, ``interrupted`` and ``series``.
    """

    def answer(request: Request) -> None:
        if isinstance(request, GradientRequest):
            learner.leave_gradient(losses, request)
        else:
            request.losses = probe()

    loop = training_loop(learner, rule=rule, log=log, save=save, interrupted=interrupted, series=series)
    return answer_requests(loop, answer)


def training_loop(
    learner: Learner,
    *,
    rule: Rule,
    log: Callable[[Mapping[str, Any]], None],
    save: Callable[[], None],
    interrupted: Callable[[], bool] = lambda: False,
    series: Series | None = None,
) -> Generator[StepRecord | Request, None, None]:
    """Yield a `StepRecord` for the untouched model and one after each update, and requests for what they need.

    L_det is evaluated at the steps that the config probes, so N updates give N + 1 evaluations at cadence 1. Whoever
    breaks out of the loop leaves a run that can be resumed. A loss that is not finite stops, and neither moves the
    model nor is saved.

    Args:
        learner: What is trained; with records in its trace, training resumes after the last one.
        rule: Decides on the trace whether to stop.
        log: Receives each record before its step is yielded.
        save: Called every ``checkpointing_steps`` and at the last step, before the step is yielded.
        interrupted: Whether to stop. The step in progress is completed and saved; between two forward passes of an
            update, the update is abandoned and the step before it is saved.
        series: Returns further metrics for the record of a step, and times its work on the stopwatch. It must leave
            the model as it is. If it raises `Abandoned`, the record has none of its metrics.

    Source: Section 3.2 and Figure 10.
    Deviates: The untouched model is evaluated too; the released code evaluates before each update and so never after
        the last.
    """
    config, trace, processes, watch = learner.config, learner.trace, learner.processes, Stopwatch(learner.device)
    if len(trace) and rule(trace).stop:
        return
    for step in range(learner.next_step, config.max_train_steps + 1):
        with watch("train"):
            try:
                if step:
                    processes.call("update", step=step)
                update = (yield from learner.updating(step, interrupted)) if step else Update()
            except Abandoned:
                save()
                return
        due = config.is_probed(step)
        held_losses = None
        with watch("probe"):
            if due and update.taken:
                yield (held := HeldRequest())
                held_losses = held.losses
        try:
            metrics = series(step, watch) if series and update.taken else {}
        except Abandoned:
            metrics = {}
        facts: dict[str, Any] = {
            "train_loss": update.train_loss,
            "grad_norm": update.grad_norm,
            "lr": update.lr,
            "seconds": watch.lap(),
        }
        record = trace.record(step, held_losses, **facts, **metrics)
        log(record)
        finite = update.taken and (held_losses is None or bool(held_losses.isfinite().all()))
        processes.call("ask")
        asked_to_stop = processes.any(interrupted(), learner.device)
        verdict = _final_verdict(rule(trace), step, finite, asked_to_stop)
        learner.keep_best()
        if verdict.reason is not Reason.NON_FINITE and (verdict.stop or step % config.checkpointing_steps == 0):
            save()
        yield StepRecord(step, eval=None if held_losses is None else tuple(record["eval"]), verdict=verdict, **facts)
        if verdict.stop:
            return


class Learner:
    """Everything that moves in training: what the method learns, the optimizer, the trace and the best step so far."""

    def __init__(
        self,
        method: TrainableMethod,
        config: TrainingConfig,
        header: Mapping[str, Any],
        processes: Processes = ALONE,
    ) -> None:
        self.method, self.config, self.trace, self.processes = method, config, Trace(header), processes
        self.best_step, self.best = 0, method.state
        self.optimizer = make_optimizer(config, method.parameters, getattr(method, "rate_factors", ()))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.mixed_precision == "fp16")
        self._rate_factor = _rate_factor(config)
        self._freeze_word: Callable[[], None] = getattr(method, "freeze_word", lambda: None)

    @property
    def device(self) -> torch.device:
        """The device of what is trained."""
        return self.method.parameters[0].device

    @property
    def next_step(self) -> int:
        """The step of the next record."""
        return self.trace.last_step + 1 if len(self.trace) else 0

    def update(self, losses: Losses, step: int, interrupted: Callable[[], bool] = lambda: False) -> Update:
        """Make update number ``step`` as `updating` does, each of its requests answered by a pass of its own."""
        return outcome_of(self.updating(step, interrupted), partial(self.leave_gradient, losses))

    def leave_gradient(self, losses: Losses, request: GradientRequest) -> None:
        """Answer a request by a forward and a backward pass of its own."""
        with seeded_globals(self.config.seed, "dropout", request.step, request.first):
            part_losses = losses(request.step, request.first, request.count)
            torch.autograd.backward(request.objective(part_losses))
        request.losses = part_losses.detach()

    def updating(
        self, step: int, interrupted: Callable[[], bool] = lambda: False
    ) -> Generator[GradientRequest, None, Update]:
        """Make update number ``step`` and return its mean loss, the norm of its gradient and its learning rate.

        Under SAM the norm is that of the gradient at the perturbed point, which is the one applied, and the loss is the
        one at the unperturbed point.

        Raises:
            Abandoned: ``interrupted`` returned True between two forward passes; nothing moved.
        """
        config = self.config
        if 0 < config.pivot_step < step:
            self._freeze_word()
        loss, norm = yield from self._measure_gradient(step, interrupted)
        # A gradient that overflows fp16 is made again under half the scale: what is skipped would count as a step that
        # moved nothing. Without a scale, or under the least, it is a fault.
        while self.scaler.is_enabled() and math.isfinite(loss) and not math.isfinite(norm):
            self.scaler.update()
            if self.scaler.get_scale() < 1:
                break
            loss, norm = yield from self._measure_gradient(step, interrupted)
        rate = config.learning_rate * self._rate_factor(step - 1)
        taken = math.isfinite(loss) and math.isfinite(norm)
        if taken:
            if config.max_grad_norm is not None:
                nn.utils.clip_grads_with_norm_(self.method.parameters, config.max_grad_norm, torch.tensor(norm))
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group.get("factor", 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Update(loss, norm, rate, taken)

    def _measure_gradient(
        self, step: int, interrupted: Callable[[], bool]
    ) -> Generator[GradientRequest, None, tuple[float, float]]:
        """Leave the gradient of an update in the parameters, unscaled; return the mean loss and the gradient's norm."""
        mean = yield from self._compute_gradient(step, interrupted)
        if self.config.optimizer == "sam":
            with perturb(self.method.parameters, self.config.sam_rho):
                yield from self._compute_gradient(step, interrupted)
        self.scaler.unscale_(self.optimizer)
        gradients = [gradient for part in self.method.parameters if (gradient := part.grad) is not None]
        # Both leave the device at once: each wait for it would let it run dry.
        loss, norm = torch.stack([mean, nn.utils.get_total_norm(gradients).double()]).tolist()
        return loss, norm

    def _compute_gradient(self, step: int, interrupted: Callable[[], bool]) -> Generator[GradientRequest, None, Tensor]:
        """Leave the gradient of the mean loss of a step in the parameters; return that loss, float64 on its device.

        The samples of a step are numbered through its accumulation and over all processes, so splitting it differently
        draws the same ones.
        """
        config, processes = self.config, self.processes
        samples = config.gradient_accumulation_steps * config.train_batch_size
        step_losses = []
        self.optimizer.zero_grad()
        for part in processes.share(samples, config.train_batch_size):
            if part.start and processes.count == 1 and interrupted():  # several must abandon an update together
                raise Abandoned
            request = GradientRequest(step, part.start, len(part), partial(self._scaled_mean, samples / len(part)))
            yield request
            step_losses.append(request.losses)
        processes.sum_gradients([weight.grad for weight in self.method.parameters if weight.grad is not None])
        return processes.gather(torch.cat(step_losses)).double().mean()

    def _scaled_mean(self, parts: float, losses: Tensor) -> Tensor:
        """Return the mean of the losses of one of so many parts of a step, as the gradient takes it."""
        scaled: Tensor = self.scaler.scale(losses.mean() / parts)
        return scaled

    @property
    def best_by(self) -> str:
        """The judge of the best step so far: L_det where it is to be CLIP and no trained step has a score yet."""
        scored = self.config.best_by != "clip" or len(self._clip_scores()[0])
        return self.config.best_by if scored else "l_det"

    def _clip_scores(self) -> tuple[Any, Any]:
        """Return the steps that have a CLIP score and the scores, without the untouched model's."""
        steps, values = self.trace.metric("clip_image")
        return steps[steps > 0], values[steps > 0]

    def keep_best(self) -> None:
        """Copy what is learned if the newest record is the best so far, as ``best_by`` judges it."""
        by, trace = self.best_by, self.trace
        steps, values = self._clip_scores() if by == "clip" else (trace.steps, trace.values)
        if not len(steps) or steps[-1] != trace.last_step or not math.isfinite(values[-1]):
            return
        earlier = values[:-1][np.isfinite(values[:-1])]
        is_best = {
            "l_det": values[-1] < earlier.min(initial=math.inf),
            "clip": values[-1] > earlier.max(initial=-math.inf),
            "stop": True,
        }
        if is_best[by]:
            self.best_step, self.best = trace.last_step, self.method.state

    def checkpoint(self, **facts: Any) -> Checkpoint:
        """Return a checkpoint of the learner, with ``facts`` added to those it needs."""
        tensors = {f"method/{name}": tensor for name, tensor in self.method.state.items()}
        tensors |= {f"best/{name}": tensor for name, tensor in self.best.items()}
        state_tensors, state_facts = read_state(self.optimizer)
        tensors |= {f"optimizer/{path}": tensor for path, tensor in state_tensors.items()}
        facts |= {"best_step": self.best_step, "scaler": self.scaler.state_dict(), "optimizer": state_facts}
        return Checkpoint(self.trace.last_step, tensors, facts, self.trace)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over a ``checkpoint`` that was made under the same config."""
        groups: dict[str, dict[str, Tensor]] = {"method": {}, "best": {}, "optimizer": {}}
        for key, tensor in checkpoint.tensors.items():
            group, name = key.split("/", 1)
            groups[group][name] = tensor
        self.method.load(groups["method"])
        self.best_step, self.best = checkpoint.facts["best_step"], groups["best"]
        load_state(self.optimizer, groups["optimizer"], checkpoint.facts["optimizer"])
        self.scaler.load_state_dict(checkpoint.facts["scaler"])
        self.trace = checkpoint.trace


class Stopwatch:
    """Seconds by name since the last lap; the rest is "other".

    A GPU works on after the call that gave it work has returned. What it does in a scope is timed by events in its own
    queue, and a lap waits for it.

    Args:
        device: The device that works; a CPU by default.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._moment: Callable[[], Moment] = _cuda_moment if device and device.type == "cuda" else _CpuMoment
        self._started = time.perf_counter()
        self._scopes: list[tuple[str, Moment, Moment]] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time a scope under ``name``."""
        start = self._moment()
        yield
        self._scopes.append((name, start, self._moment()))

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap, by name, and start the next."""
        seconds = {"train": 0.0, "probe": 0.0}
        for name, start, end in self._scopes:
            end.synchronize()
            seconds[name] = seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        now = time.perf_counter()
        lap = {**seconds, "other": max(0.0, now - self._started - sum(seconds.values()))}
        self._started, self._scopes = now, []
        return lap


class Moment(Protocol):
    """A moment as `torch.cuda.Event` marks it in the queue of a GPU."""

    def synchronize(self) -> None:
        """Wait for the moment."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Return the milliseconds from this moment to a later one."""
        ...


class _CpuMoment:
    """A moment of a CPU, which has done its work when a call returns."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _CpuMoment) -> float:
        return 1000 * (end.seconds - self.seconds)


def _cuda_moment() -> Moment:
    moment = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    moment.record()
    return moment


Series = Callable[[int, Stopwatch], Mapping[str, Any]]
"""(step, stopwatch) -> further metrics of the model after this step, by name."""


def _final_verdict(verdict: Verdict, step: int, finite: bool, interrupted: bool) -> Verdict:
    """Return the rule's verdict, unless a loss that is not finite or an interruption ends the run."""
    if not finite:
        metrics = {**verdict.metrics, "non_finite_step": step}
        return replace(verdict, stop=True, reason=Reason.NON_FINITE, step=step, metrics=metrics)
    if interrupted:  # also where the rule stops: what follows a stop takes time, and is done when the run resumes
        return replace(verdict, stop=True, reason=Reason.INTERRUPTED, step=step)
    return verdict


def _rate_factor(config: TrainingConfig) -> Callable[[int], float]:
    """Return the factor of the learning rate by update, as diffusers defines it: a function, so nothing to resume."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
    )
    factor: Callable[[int], float] = schedule.lr_lambdas[0]
    return factor
