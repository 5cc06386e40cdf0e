"""The stopper, as Ray Tune's controller calls and saves it."""

# `tests/test_docs.py` runs a complete experiment, which takes long (make test-all).

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from ray import cloudpickle

from dvar import Dvar, RefusedInput
from dvar.stopping.integrations.ray import DvarStopper

STOP = Dvar(window=20, threshold=0.2)


def build_result(step: int, pace: float = 6.0) -> dict[str, Any]:
    return {"training_iteration": step, "loss": math.exp(-step / pace)}


def run_until_stop(stopper: DvarStopper, trial: str, first: int = 1) -> int:
    return next(step for step in range(first, 300) if stopper(trial, build_result(step)))


def test_it_keeps_a_trace_for_each_trial() -> None:
    stopper = DvarStopper(STOP, "loss")
    for step in range(1, 15):
        assert not stopper("a", build_result(step))
        assert not stopper("b", build_result(step, pace=12.0))
    assert stopper.traces["b"].values.tolist() == [math.exp(-step / 12) for step in range(1, 15)]
    assert run_until_stop(stopper, "a", 15) == run_until_stop(DvarStopper(STOP, "loss"), "alone")
    assert not stopper.stop_all()


@pytest.mark.parametrize("copy_stopper", [copy.deepcopy, lambda stopper: cloudpickle.loads(cloudpickle.dumps(stopper))])
def test_it_continues_from_the_copy_that_ray_saves(copy_stopper: Any) -> None:
    stopper = DvarStopper(STOP, "loss")
    for step in range(1, 15):
        stopper("a", build_result(step))
    again = copy_stopper(stopper)
    assert run_until_stop(again, "a", 15) == run_until_stop(DvarStopper(STOP, "loss"), "a")
    assert stopper.traces["a"].last_step == 14  # a copy of its own


def test_steps_reported_again_after_a_restart_replace_the_earlier_ones() -> None:
    stopper = DvarStopper(STOP, "loss")
    for step in (*range(1, 15), *range(10, 12)):
        stopper("a", build_result(step))
    assert stopper.traces["a"].steps.tolist() == list(range(1, 12))
    assert run_until_stop(stopper, "a", 12) == run_until_stop(DvarStopper(STOP, "loss"), "a")


def test_a_result_without_the_metric_is_refused() -> None:
    with pytest.raises(RefusedInput) as refused:
        DvarStopper(STOP, "eval_loss", step="updates")("t1", build_result(3))
    assert refused.value.problems == (
        "trial t1 reports no 'updates': report it, or name another of training_iteration, loss",
        "trial t1 reports no 'eval_loss': report it, or name another of training_iteration, loss",
    )


def test_a_trial_that_ends_without_a_report_is_nothing_to_judge() -> None:
    stopper = DvarStopper(STOP, "loss")
    assert not stopper("t1", {"trial_id": "t1", "config": {}, "done": True})  # as ray 2.60 says it
    assert stopper.traces == {}


def test_the_last_report_sent_twice_counts_once() -> None:
    stopper = DvarStopper(STOP, "loss")
    for step in (1, 2, 3):
        stopper("t1", build_result(step))
    stopper("t1", {**build_result(3), "done": True})  # as ray 2.60 does at a trial's own end
    assert stopper.traces["t1"].steps.tolist() == [1, 2, 3]
