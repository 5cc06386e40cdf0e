"""The training loop on a model of two numbers, whose loss is the squared distance to targets drawn by key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.randomness import generator
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AnyOf, Dvar, FixedSteps
from dvar.training.loop import Learner, StepRecord, Stopwatch, train

PACKAGES = {"adamw": "torch", "sam": "torch", "prodigy": "prodigyopt", "adamw8bit": "bitsandbytes"}
CONFIG: dict[str, Any] = {"max_train_steps": 12, "learning_rate": 0.1, "train_batch_size": 2, "checkpointing_steps": 5}


class Toy:
    """A method that learns two numbers."""

    def __init__(self) -> None:
        self.rows = nn.Parameter(torch.tensor([3.0, -2.0]))

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.rows]

    @property
    def state(self) -> dict[str, Tensor]:
        return {"rows": self.rows.detach().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.rows.copy_(state["rows"])


class Bench:
    """A learner and everything that the loop calls, with records of the calls."""

    def __init__(self, **settings: Any) -> None:
        self.config = TextualInversionConfig(**{**CONFIG, **settings})
        self.method = Toy()
        self.learner = Learner(self.method, self.config, {"toy": True})
        self.draws: list[tuple[int, int]] = []
        self.records: list[dict[str, Any]] = []
        self.saved_steps: list[int] = []
        self.rule: Any = FixedSteps(self.config.max_train_steps)
        self.corrupt: Callable[[Tensor, int], Tensor] = lambda losses, step: losses

    def losses(self, step: int, first: int, count: int) -> Tensor:
        indices = range(first, first + count)
        self.draws += [(step, index) for index in indices]
        targets = torch.stack([torch.randn(2, generator=generator(0, "toy", step, index)) for index in indices])
        rows = self.method.rows.expand_as(targets)
        rows = nn.functional.dropout(rows, 0.5) if self.config.seed else rows
        return self.corrupt((rows - targets).square().mean(dim=1), step)

    def probe(self) -> Tensor:
        return (self.method.rows.detach() - torch.tensor([[0.0, 0.0], [1.0, 1.0]])).square().mean(dim=1)

    def log(self, record: Mapping[str, Any]) -> None:
        self.records.append(dict(record))

    def save(self) -> None:
        self.saved_steps.append(self.learner.trace.last_step)

    def run(self, **options: Any) -> list[StepRecord]:
        parts = {"losses": self.losses, "probe": self.probe, "rule": self.rule, "log": self.log}
        return list(train(self.learner, **{**parts, "save": self.save, **options}))


def test_n_updates_give_n_plus_one_evaluations_the_first_of_the_untouched_model() -> None:
    bench = Bench()
    untouched = tuple(bench.probe().tolist())
    steps = bench.run()
    assert [step.step for step in steps] == list(range(13))
    assert all(step.eval is not None for step in steps)
    assert steps[0].eval == untouched
    assert (steps[0].train_loss, steps[0].grad_norm, steps[0].lr) == (None, None, None)
    assert steps[-1].eval == tuple(bench.probe().tolist())
    assert [verdict.stop for verdict in (step.verdict for step in steps)] == [False] * 12 + [True]
    assert steps[-1].verdict.reason is Reason.CAP


@pytest.mark.parametrize(
    ("cadence", "expected"), [(1, list(range(13))), (5, [0, 5, 10, 12]), (6, [0, 6, 12]), (50, [0, 12])]
)
def test_evaluations_come_at_the_cadence_and_at_the_cap(cadence: int, expected: list[int]) -> None:
    bench = Bench(probe_every=cadence)
    steps = bench.run()
    assert [step.step for step in steps if step.eval] == expected
    assert bench.learner.trace.steps.tolist() == expected
    assert len(bench.learner.trace) == 13


def test_measuring_does_not_disturb_training() -> None:
    frequent, rare = Bench(probe_every=1, seed=1), Bench(probe_every=7, seed=1)
    torch.manual_seed(0)
    losses = [step.train_loss for step in frequent.run()]
    torch.manual_seed(1)
    assert [step.train_loss for step in rare.run()] == losses
    assert torch.equal(frequent.method.rows, rare.method.rows)


def test_extra_series_are_recorded_at_their_step_and_timed_separately() -> None:
    plain, bench = Bench(), Bench()
    plain.run()

    def twice(step: int, watch: Stopwatch) -> dict[str, int]:
        with watch("doubling"):
            return {"twice": 2 * step} if step % 5 == 0 else {}

    steps = bench.run(series=twice)
    assert bench.learner.trace.metric("twice")[0].tolist() == [0, 5, 10]
    assert bench.learner.trace.metric("twice")[1].tolist() == [0, 10, 20]
    assert all(step.seconds.keys() == {"train", "probe", "doubling", "other"} for step in steps)
    records = [{name: row[name] for name in row if name not in ("twice", "seconds")} for row in bench.records]
    assert records == [{name: row[name] for name in row if name != "seconds"} for row in plain.records]


@pytest.mark.parametrize(("criterion", "best"), [("l_det", 12), ("clip", 6), ("stop", 12)])
def test_the_best_step_follows_the_criterion(criterion: str, best: int) -> None:
    scores = {0: 0.9, 3: 0.4, 6: 0.7, 9: 0.7}  # that of the untouched model does not count, and of equals the first
    bench, states = Bench(best_by=criterion), {}

    def series(step: int, watch: Stopwatch) -> dict[str, float]:
        states[step] = bench.method.state["rows"]
        return {"clip_image": scores[step]} if step in scores else {}

    bench.run(series=series)
    values = bench.learner.trace.values
    assert bench.learner.best_step == (int(values.argmin()) if criterion == "l_det" else best)
    assert torch.equal(bench.learner.best["rows"], states[bench.learner.best_step])


def test_the_best_step_by_stop_of_a_failed_run_is_the_last_finite_step() -> None:
    bench = Bench(best_by="stop")
    bench.corrupt = lambda losses, step: losses * math.nan if step == 7 else losses
    bench.run()
    assert bench.learner.best_step == 6


def test_a_failed_step_records_no_extra_series() -> None:
    bench = Bench()
    steps: list[int] = []
    bench.corrupt = lambda losses, step: losses * math.nan if step == 4 else losses

    def series(step: int, watch: Stopwatch) -> dict[str, Any]:
        steps.append(step)
        return {}

    bench.run(series=series)
    assert steps == [0, 1, 2, 3]


def test_dropout_differs_between_steps_and_accumulation_parts() -> None:
    bench, numbers = Bench(gradient_accumulation_steps=2), set()

    def losses(step: int, first: int, count: int) -> Tensor:
        numbers.add(tuple(torch.rand(4).tolist()))
        return bench.losses(step, first, count)

    bench.run(losses=losses)
    assert len(numbers) == 2 * 12


def test_training_preserves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    Bench(seed=1).run()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_samples_of_a_step_are_numbered_through_its_accumulation() -> None:
    batch, parts = Bench(train_batch_size=6), Bench(train_batch_size=2, gradient_accumulation_steps=3)
    for first, second in zip(batch.run()[1:], parts.run()[1:], strict=True):
        assert first.train_loss == pytest.approx(second.train_loss, rel=1e-6)
        assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-5)
    assert batch.draws == parts.draws == list(itertools.product(range(1, 13), range(6)))
    torch.testing.assert_close(batch.method.rows, parts.method.rows)


def test_an_update_is_adamw_on_the_mean_loss() -> None:
    bench, reference = Bench(learning_rate=0.1, adam_weight_decay=0.5), Bench()
    optimizer = torch.optim.AdamW(reference.method.parameters, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for step in bench.run()[1:]:
        optimizer.zero_grad()
        loss = reference.losses(step.step, 0, 2).mean()
        torch.autograd.backward(loss)
        assert step.train_loss == pytest.approx(float(loss.detach()))
        assert step.grad_norm == pytest.approx(float(reference.method.rows.grad.norm()))  # type: ignore[union-attr]
        optimizer.step()
    assert torch.equal(bench.method.rows, reference.method.rows)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_a_gradient_above_the_limit_is_clipped_and_reported_unclipped(limit: float) -> None:
    bench, free = Bench(max_grad_norm=limit), Bench()
    update, free_update = bench.learner.update(bench.losses, 1), free.learner.update(free.losses, 1)
    assert update == free_update
    gradient, clipped_gradient = free.method.rows.grad, bench.method.rows.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0.5
    torch.testing.assert_close(clipped_gradient, gradient * min(1.0, limit / float(gradient.norm())))


def test_the_learning_rate_follows_the_named_schedule() -> None:
    steps = Bench(lr_scheduler="linear", lr_warmup_steps=4).run()
    # Up by a quarter an update to 0.1, then down by an eighth: 12 updates, 4 of them warm-up.
    expected = [0.1 * factor for factor in (0, 1 / 4, 2 / 4, 3 / 4, *(eighths / 8 for eighths in range(8, 0, -1)))]
    assert [step.lr for step in steps[1:]] == pytest.approx(expected)


def test_a_rule_stops_the_run_and_the_last_step_is_saved() -> None:
    bench = Bench(max_train_steps=500, checkpointing_steps=100)
    bench.rule = AnyOf((Dvar(window=10, threshold=0.2), FixedSteps(500)))
    steps = bench.run()
    assert steps[-1].verdict.reason is Reason.STABILISED
    assert [step.verdict.stop for step in steps] == [False] * (len(steps) - 1) + [True]
    assert 10 < steps[-1].step < 500
    assert bench.saved_steps == [*range(0, steps[-1].step, 100), steps[-1].step]


def test_log_and_checkpoint_are_written_before_a_step_is_yielded() -> None:
    bench = Bench()
    for step in train(
        bench.learner, losses=bench.losses, probe=bench.probe, rule=bench.rule, log=bench.log, save=bench.save
    ):
        assert bench.records[-1]["step"] == step.step
        assert bench.records[-1] == bench.learner.trace.records[-1]
        if step.step % 5 == 0:
            assert bench.saved_steps[-1] == step.step
    assert bench.saved_steps == [0, 5, 10, 12]


@pytest.mark.parametrize("optimizer", [name for name, package in PACKAGES.items() if find_spec(package)])
def test_a_resumed_run_equals_an_uninterrupted_run(optimizer: str) -> None:
    settings = {"seed": 1, "optimizer": optimizer, "gradient_accumulation_steps": 2}
    reference = Bench(**settings)
    expected = reference.run()
    for last_step in range(13):
        bench, resumed = Bench(**settings), Bench(**settings)
        parts = {"losses": bench.losses, "probe": bench.probe, "rule": bench.rule, "log": bench.log}
        steps = []
        for step in train(bench.learner, **parts, save=bench.save):
            steps.append(step)
            if step.step == last_step:
                break
        resumed.learner.restore(bench.learner.checkpoint())
        assert [comparable_fields(step) for step in steps + resumed.run()] == [
            comparable_fields(step) for step in expected
        ]
        assert torch.equal(resumed.method.rows, reference.method.rows)
        assert resumed.learner.best_step == reference.learner.best_step
        assert torch.equal(resumed.learner.best["rows"], reference.learner.best["rows"])


def test_the_fp16_loss_scale_is_restored() -> None:
    bench, resumed = Bench(mixed_precision="fp16"), Bench(mixed_precision="fp16")
    bench.learner.trace.record(0, [1.0])
    bench.learner.scaler.scale(torch.ones(()))  # which makes its tensors
    bench.method.rows.grad = torch.full((2,), math.inf)
    bench.learner.scaler.step(bench.learner.optimizer)
    bench.learner.scaler.update()
    resumed.learner.restore(bench.learner.checkpoint())
    assert resumed.learner.scaler.state_dict() == bench.learner.scaler.state_dict()
    assert resumed.learner.scaler.get_scale() == 2**15


def comparable_fields(step: StepRecord) -> tuple[Any, ...]:
    return step.step, step.train_loss, step.eval, step.verdict, step.grad_norm, step.lr


def test_resuming_a_finished_run_takes_no_step() -> None:
    bench = Bench()
    bench.run()
    assert bench.run() == []


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_training_loss_that_is_not_finite_stops_without_an_update(factor: float) -> None:
    bench, reference = Bench(), Bench(max_train_steps=6)
    bench.corrupt = lambda losses, step: losses * factor if step == 7 else losses
    steps = bench.run()
    reference.run()
    assert steps[-1].step == 7
    assert steps[-1].verdict.stop
    assert steps[-1].verdict.reason is Reason.NON_FINITE
    assert "not finite at step 7" in steps[-1].verdict.sentence
    assert steps[-1].eval is None
    assert torch.equal(bench.method.rows, reference.method.rows)
    assert bench.saved_steps == [0, 5]
    assert not math.isfinite(bench.records[-1]["train_loss"])


def test_a_gradient_that_is_not_finite_stops_without_an_update() -> None:
    bench = Bench()

    def corrupt(losses: Tensor, step: int) -> Tensor:
        if step == 3:
            losses.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
        return losses

    bench.corrupt = corrupt
    steps = bench.run()
    assert steps[-1].verdict.reason is Reason.NON_FINITE
    assert math.isfinite(steps[-1].train_loss or math.nan)
    assert torch.isfinite(bench.method.rows).all()


def test_an_evaluation_that_is_not_finite_stops_and_is_not_the_best() -> None:
    for last_step in (4, 12):  # 12 is the cap, which must not hide it
        bench = Bench()
        evaluations = iter([torch.tensor([1.0 / step, 1.0]) for step in range(1, last_step + 1)])
        steps = bench.run(probe=lambda evaluations=evaluations: next(evaluations, torch.tensor([math.nan, 0.0])))
        assert steps[-1].step == last_step
        assert steps[-1].verdict.stop
        assert steps[-1].verdict.reason is Reason.NON_FINITE
        assert bench.learner.best_step == last_step - 1
        assert last_step not in bench.saved_steps


def test_an_interrupted_run_finishes_its_step_and_saves_it() -> None:
    bench = Bench()
    steps = bench.run(interrupted=lambda: len(bench.records) > 8)
    assert steps[-1].step == 8
    assert steps[-1].verdict.stop
    assert steps[-1].verdict.reason is Reason.INTERRUPTED
    assert bench.saved_steps == [0, 5, 8]
    assert [step.step for step in bench.run()] == [9, 10, 11, 12]


def test_the_best_step_has_the_lowest_mean_loss() -> None:
    bench = Bench()
    values = [9.0, 8.0, 7.0, 8.0, 7.0, 6.0, 6.5, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    losses = iter(values)
    parts = {"losses": bench.losses, "rule": bench.rule, "log": bench.log, "save": bench.save}
    steps = train(bench.learner, probe=lambda: torch.tensor([next(losses)]), **parts)
    rows = [bench.method.state["rows"] for _ in steps]
    assert bench.learner.best_step == 5  # of two equal ones the first
    assert torch.equal(bench.learner.best["rows"], rows[5])
    assert not torch.equal(rows[5], rows[12])


def test_seconds_are_recorded_by_part() -> None:
    for step in Bench().run():
        assert step.seconds.keys() == {"train", "probe", "other"}
        assert all(seconds >= 0 for seconds in step.seconds.values())


def test_under_fp16_an_overflowing_gradient_is_made_again_under_half_the_scale() -> None:
    bench, plain = Bench(mixed_precision="fp16"), Bench(mixed_precision="fp16")
    scaler = bench.learner.scaler

    def corrupt(losses: Tensor, step: int) -> Tensor:
        if step == 1 and scaler.get_scale() > 2**13:
            losses.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return losses

    bench.corrupt = corrupt
    plain.learner.scaler.scale(torch.ones(()))  # which makes its tensors
    plain.learner.scaler.update(2.0**13)
    steps, plain_steps = bench.run(), plain.run()
    assert scaler.get_scale() == 2**13
    assert bench.draws[:8] == plain.draws[:2] * 4, "three times again, from the same draws"
    assert torch.equal(bench.method.rows, plain.method.rows), "every step moved the model"
    assert [step.grad_norm for step in steps] == [step.grad_norm for step in plain_steps]


def test_a_gradient_that_overflows_under_any_scale_ends_the_run() -> None:
    bench = Bench(mixed_precision="fp16")

    def corrupt(losses: Tensor, step: int) -> Tensor:
        if step == 3:
            losses.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return losses

    bench.corrupt = corrupt
    steps = bench.run()
    assert (steps[-1].step, steps[-1].verdict.reason) == (3, Reason.NON_FINITE)


class Event:
    """A moment in the queue of a GPU that does each piece of work in a second, once it is waited for."""

    queue = 0

    def __init__(self) -> None:
        self.at, self.waited = Event.queue, False

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        assert end.waited, "its work may not be done"
        return 1000.0 * (end.at - self.at)


def test_work_on_a_gpu_is_timed_in_its_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dvar.training.loop._cuda_moment", Event)
    watch = Stopwatch(torch.device("cuda"))
    for name, pieces in (("train", 3), ("probe", 1), ("train", 2)):
        with watch(name):
            Event.queue += pieces
    assert watch.lap() == {"train": 5.0, "probe": 1.0, "other": 0.0}
    assert watch.lap() == {"train": 0.0, "probe": 0.0, "other": pytest.approx(0.0, abs=1.0)}
