"""The loop on a model of two numbers, whose loss is the squared distance to targets drawn by key."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dvar.config.training import TextualInversionConfig
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
    """A learner and everything the loop calls, each noting what it was called with."""

    def __init__(self, **settings: Any) -> None:
        self.config = TextualInversionConfig(**{**CONFIG, **settings})
        self.method = Toy()
        self.learner = Learner(self.method, self.config, {"toy": True})
        self.drawn: list[tuple[int, int]] = []
        self.logged: list[dict[str, Any]] = []
        self.saved: list[int] = []
        self.rule: Any = FixedSteps(self.config.max_train_steps)
        self.spoil: Callable[[Tensor, int], Tensor] = lambda losses, step: losses

    def losses(self, step: int, first: int, count: int) -> Tensor:
        indices = range(first, first + count)
        self.drawn += [(step, index) for index in indices]
        targets = torch.stack([torch.randn(2, generator=generator(0, "toy", step, index)) for index in indices])
        rows = self.method.rows.expand_as(targets)
        rows = nn.functional.dropout(rows, 0.5) if self.config.seed else rows
        return self.spoil((rows - targets).square().mean(dim=1), step)

    def probe(self) -> Tensor:
        return (self.method.rows.detach() - torch.tensor([[0.0, 0.0], [1.0, 1.0]])).square().mean(dim=1)

    def log(self, record: Mapping[str, Any]) -> None:
        self.logged.append(dict(record))

    def save(self) -> None:
        self.saved.append(self.learner.trace.last_step)

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
    ("every", "expected"), [(1, list(range(13))), (5, [0, 5, 10, 12]), (6, [0, 6, 12]), (50, [0, 12])]
)
def test_evaluations_come_at_the_cadence_and_at_the_cap(every: int, expected: list[int]) -> None:
    bench = Bench(probe_every=every)
    steps = bench.run()
    assert [step.step for step in steps if step.eval] == expected
    assert bench.learner.trace.steps.tolist() == expected
    assert len(bench.learner.trace) == 13


def test_measuring_does_not_disturb_training() -> None:
    often, seldom = Bench(probe_every=1, seed=1), Bench(probe_every=7, seed=1)
    torch.manual_seed(0)
    losses = [step.train_loss for step in often.run()]
    torch.manual_seed(1)
    assert [step.train_loss for step in seldom.run()] == losses
    assert torch.equal(often.method.rows, seldom.method.rows)


def test_more_series_go_into_the_record_of_their_step_and_their_seconds_are_apart() -> None:
    plain, bench = Bench(), Bench()
    plain.run()

    def twice(step: int, watch: Stopwatch) -> dict[str, int]:
        with watch("doubling"):
            return {"twice": 2 * step} if step % 5 == 0 else {}

    steps = bench.run(series=twice)
    assert bench.learner.trace.metric("twice")[0].tolist() == [0, 5, 10]
    assert bench.learner.trace.metric("twice")[1].tolist() == [0, 10, 20]
    assert all(step.seconds.keys() == {"train", "probe", "doubling", "other"} for step in steps)
    kept = [{name: row[name] for name in row if name not in ("twice", "seconds")} for row in bench.logged]
    assert kept == [{name: row[name] for name in row if name != "seconds"} for row in plain.logged]


@pytest.mark.parametrize(("by", "best"), [("l_det", 12), ("clip", 6), ("stop", 12)])
def test_the_best_step_is_that_of_the_users_criterion(by: str, best: int) -> None:
    scores = {0: 0.9, 3: 0.4, 6: 0.7, 9: 0.7}  # that of the untouched model does not count, and of equals the first
    bench, states = Bench(best_by=by), {}

    def series(step: int, watch: Stopwatch) -> dict[str, float]:
        states[step] = bench.method.state["rows"]
        return {"clip_image": scores[step]} if step in scores else {}

    bench.run(series=series)
    values = bench.learner.trace.values
    assert bench.learner.best_step == (int(values.argmin()) if by == "l_det" else best)
    assert torch.equal(bench.learner.best["rows"], states[bench.learner.best_step])


def test_the_last_sound_step_is_the_best_by_the_stop_of_a_run_that_fails() -> None:
    bench = Bench(best_by="stop")
    bench.spoil = lambda losses, step: losses * math.nan if step == 7 else losses
    bench.run()
    assert bench.learner.best_step == 6


def test_a_step_that_failed_has_no_more_series() -> None:
    bench = Bench()
    asked: list[int] = []
    bench.spoil = lambda losses, step: losses * math.nan if step == 4 else losses

    def series(step: int, watch: Stopwatch) -> dict[str, Any]:
        asked.append(step)
        return {}

    bench.run(series=series)
    assert asked == [0, 1, 2, 3]


def test_dropout_is_fresh_at_every_step_and_in_every_part_of_it() -> None:
    bench, seen = Bench(gradient_accumulation_steps=2), set()

    def losses(step: int, first: int, count: int) -> Tensor:
        seen.add(tuple(torch.rand(4).tolist()))
        return bench.losses(step, first, count)

    bench.run(losses=losses)
    assert len(seen) == 2 * 12


def test_training_leaves_the_global_random_state() -> None:
    state = torch.get_rng_state()
    Bench(seed=1).run()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_samples_of_a_step_are_numbered_through_its_accumulation() -> None:
    whole, parts = Bench(train_batch_size=6), Bench(train_batch_size=2, gradient_accumulation_steps=3)
    for one, other in zip(whole.run()[1:], parts.run()[1:], strict=True):
        assert one.train_loss == pytest.approx(other.train_loss, rel=1e-6)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    assert whole.drawn == parts.drawn == list(itertools.product(range(1, 13), range(6)))
    torch.testing.assert_close(whole.method.rows, parts.method.rows)


def test_an_update_is_adamw_on_the_mean_loss() -> None:
    bench, other = Bench(learning_rate=0.1, adam_weight_decay=0.5), Bench()
    optimizer = torch.optim.AdamW(other.method.parameters, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.5)
    for step in bench.run()[1:]:
        optimizer.zero_grad()
        loss = other.losses(step.step, 0, 2).mean()
        torch.autograd.backward(loss)
        assert step.train_loss == pytest.approx(float(loss.detach()))
        assert step.grad_norm == pytest.approx(float(other.method.rows.grad.norm()))  # type: ignore[union-attr]
        optimizer.step()
    assert torch.equal(bench.method.rows, other.method.rows)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_a_gradient_above_the_limit_is_scaled_down_to_it_and_told_as_it_was(limit: float) -> None:
    bench, free = Bench(max_grad_norm=limit), Bench()
    limited, whole = bench.learner.update(bench.losses, 1), free.learner.update(free.losses, 1)
    assert limited == whole
    given, found = free.method.rows.grad, bench.method.rows.grad
    assert given is not None
    assert float(given.norm()) > 0.5
    torch.testing.assert_close(found, given * min(1.0, limit / float(given.norm())))


def test_the_rate_follows_the_schedule_by_name() -> None:
    steps = Bench(lr_scheduler="linear", lr_warmup_steps=4).run()
    # Up by a quarter an update to 0.1, then down by an eighth: 12 updates, 4 of them warm-up.
    expected = [0.1 * factor for factor in (0, 1 / 4, 2 / 4, 3 / 4, *(left / 8 for left in range(8, 0, -1)))]
    assert [step.lr for step in steps[1:]] == pytest.approx(expected)


def test_a_rule_stops_the_run_and_the_last_step_is_saved() -> None:
    bench = Bench(max_train_steps=500, checkpointing_steps=100)
    bench.rule = AnyOf((Dvar(window=10, threshold=0.2), FixedSteps(500)))
    steps = bench.run()
    assert steps[-1].verdict.reason is Reason.STABILISED
    assert [step.verdict.stop for step in steps] == [False] * (len(steps) - 1) + [True]
    assert 10 < steps[-1].step < 500
    assert bench.saved == [*range(0, steps[-1].step, 100), steps[-1].step]


def test_what_must_survive_is_kept_before_a_step_is_handed_out() -> None:
    bench = Bench()
    for step in train(
        bench.learner, losses=bench.losses, probe=bench.probe, rule=bench.rule, log=bench.log, save=bench.save
    ):
        assert bench.logged[-1]["step"] == step.step
        assert bench.logged[-1] == bench.learner.trace.records[-1]
        if step.step % 5 == 0:
            assert bench.saved[-1] == step.step
    assert bench.saved == [0, 5, 10, 12]


@pytest.mark.parametrize("optimizer", [name for name, package in PACKAGES.items() if find_spec(package)])
def test_breaking_out_and_going_on_is_an_uninterrupted_run(optimizer: str) -> None:
    settings = {"seed": 1, "optimizer": optimizer, "gradient_accumulation_steps": 2}
    straight = Bench(**settings)
    expected = straight.run()
    for broken in range(13):
        bench, other = Bench(**settings), Bench(**settings)
        parts = {"losses": bench.losses, "probe": bench.probe, "rule": bench.rule, "log": bench.log}
        first = []
        for step in train(bench.learner, **parts, save=bench.save):
            first.append(step)
            if step.step == broken:
                break
        other.learner.restore(bench.learner.checkpoint())
        assert [strip(step) for step in first + other.run()] == [strip(step) for step in expected]
        assert torch.equal(other.method.rows, straight.method.rows)
        assert other.learner.best_step == straight.learner.best_step
        assert torch.equal(other.learner.best["rows"], straight.learner.best["rows"])


def test_the_scale_of_fp16_goes_on_where_it_was() -> None:
    bench, other = Bench(mixed_precision="fp16"), Bench(mixed_precision="fp16")
    bench.learner.trace.record(0, [1.0])
    bench.learner.scaler.scale(torch.ones(()))  # which makes its tensors
    bench.method.rows.grad = torch.full((2,), math.inf)
    bench.learner.scaler.step(bench.learner.optimizer)
    bench.learner.scaler.update()
    other.learner.restore(bench.learner.checkpoint())
    assert other.learner.scaler.state_dict() == bench.learner.scaler.state_dict()
    assert other.learner.scaler.get_scale() == 2**15


def strip(step: StepRecord) -> tuple[Any, ...]:
    return step.step, step.train_loss, step.eval, step.verdict, step.grad_norm, step.lr


def test_a_finished_run_that_goes_on_has_nothing_to_do() -> None:
    bench = Bench()
    bench.run()
    assert bench.run() == []


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_training_loss_that_is_not_finite_stops_and_moves_nothing(bad: float) -> None:
    bench, sound = Bench(), Bench(max_train_steps=6)
    bench.spoil = lambda losses, step: losses * bad if step == 7 else losses
    steps = bench.run()
    sound.run()
    assert steps[-1].step == 7
    assert steps[-1].verdict.stop
    assert steps[-1].verdict.reason is Reason.NON_FINITE
    assert "not finite at step 7" in steps[-1].verdict.sentence
    assert steps[-1].eval is None
    assert torch.equal(bench.method.rows, sound.method.rows)
    assert bench.saved == [0, 5]
    assert not math.isfinite(bench.logged[-1]["train_loss"])


def test_a_gradient_that_is_not_finite_stops_and_moves_nothing() -> None:
    bench = Bench()

    def spoil(losses: Tensor, step: int) -> Tensor:
        if step == 3:
            losses.register_hook(lambda gradient: gradient * math.nan)  # type: ignore[no-untyped-call]
        return losses

    bench.spoil = spoil
    steps = bench.run()
    assert steps[-1].verdict.reason is Reason.NON_FINITE
    assert math.isfinite(steps[-1].train_loss or math.nan)
    assert torch.isfinite(bench.method.rows).all()


def test_an_evaluation_that_is_not_finite_stops_and_is_not_the_best() -> None:
    for at in (4, 12):  # 12 is the cap, which must not hide it
        bench = Bench()
        good = iter([torch.tensor([1.0 / step, 1.0]) for step in range(1, at + 1)])
        steps = bench.run(probe=lambda good=good: next(good, torch.tensor([math.nan, 0.0])))
        assert steps[-1].step == at
        assert steps[-1].verdict.stop
        assert steps[-1].verdict.reason is Reason.NON_FINITE
        assert bench.learner.best_step == at - 1
        assert at not in bench.saved


def test_an_interrupted_run_finishes_its_step_and_saves_it() -> None:
    bench = Bench()
    steps = bench.run(interrupted=lambda: len(bench.logged) > 8)
    assert steps[-1].step == 8
    assert steps[-1].verdict.stop
    assert steps[-1].verdict.reason is Reason.INTERRUPTED
    assert bench.saved == [0, 5, 8]
    assert [step.step for step in bench.run()] == [9, 10, 11, 12]


def test_the_best_step_is_the_one_of_the_lowest_mean_loss() -> None:
    bench = Bench()
    values = [9.0, 8.0, 7.0, 8.0, 7.0, 6.0, 6.5, 6.0, 7.0, 8.0, 9.0, 9.0, 9.0]
    given = iter(values)
    parts = {"losses": bench.losses, "rule": bench.rule, "log": bench.log, "save": bench.save}
    steps = train(bench.learner, probe=lambda: torch.tensor([next(given)]), **parts)
    rows = [bench.method.state["rows"] for _ in steps]
    assert bench.learner.best_step == 5  # of two equal ones the first
    assert torch.equal(bench.learner.best["rows"], rows[5])
    assert not torch.equal(rows[5], rows[12])


def test_seconds_are_told_apart_and_add_up() -> None:
    for step in Bench().run():
        assert step.seconds.keys() == {"train", "probe", "other"}
        assert all(spent >= 0 for spent in step.seconds.values())


def test_under_fp16_an_overflowing_gradient_is_skipped_and_scaled_down() -> None:
    bench = Bench(mixed_precision="fp16")

    def spoil(losses: Tensor, step: int) -> Tensor:
        if step == 1:
            losses.register_hook(lambda gradient: gradient * math.inf)  # type: ignore[no-untyped-call]
        return losses

    bench.spoil = spoil
    first = bench.method.state["rows"]
    scale = bench.learner.scaler.get_scale()
    steps = bench.run()
    assert len(steps) == 13
    assert steps[1].eval == steps[0].eval
    assert bench.learner.scaler.get_scale() < scale
    assert not torch.equal(bench.method.rows, first)
    # The scale is taken out again: the norm is that of the gradient itself.
    assert steps[2].grad_norm == pytest.approx(Bench().run()[1].grad_norm, rel=0.9)
