"""Training loops found in a source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from dvar.launch.loops import TrainingLoop, find_training_loops

PLAIN = """
for epoch in range(epochs):
    for step, batch in enumerate(train_dataloader):
        with accelerator.accumulate(unet):
            loss = compute(batch)
            accelerator.backward(loss)
        if accelerator.sync_gradients:
            global_step += 1
"""


def find_loops(source: str) -> list[TrainingLoop]:
    return find_training_loops(ast.parse(source), Path("train.py"))


def test_a_loop_is_described_by_its_source() -> None:
    (loop,) = find_loops(PLAIN)
    assert (loop.line, loop.iterable, loop.loss_line, loop.loss) == (3, "enumerate(train_dataloader)", 6, "loss")
    assert (loop.accelerator, loop.counter, loop.by_position, loop.problem) == ("accelerator", "global_step", False, "")
    assert loop.key == "train.py:3"


@pytest.mark.parametrize(
    ("before", "after", "counter"),
    [
        ("global_step += 1", "self.state.global_step += 1", "self.state.global_step"),
        ("global_step += 1", "progress['step'] += 1", "progress['step']"),
        ("global_step += 1", "seen += 1", ""),
        ("global_step += 1", "global_step += 2", ""),
        ("global_step += 1", "n_iter += 1; global_step += 1", "global_step"),
    ],
)
def test_the_counter_of_updates_is_found_by_its_name(before: str, after: str, counter: str) -> None:
    assert find_loops(PLAIN.replace(before, after))[0].counter == counter


@pytest.mark.parametrize("use", ["cache[step]", "cache[step - 1].sample()", "batch['x'] + self.cache[step]"])
def test_a_cache_read_by_position_is_noticed(use: str) -> None:
    assert find_loops(PLAIN.replace("compute(batch)", f"compute({use})"))[0].by_position
    assert not find_loops(PLAIN.replace("compute(batch)", "cache[epoch]"))[0].by_position


def test_other_iterators_are_those_read_before_backward() -> None:
    source = PLAIN.replace("compute(batch)", "compute(next(others), next(iter(x)))").replace(
        "global_step += 1", "next(later)"
    )
    assert [ast.unparse(call) for call in find_loops(source)[0].iterators] == ["next(others)"]


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("global_step += 1", "accelerator.backward(second)", "got 2 in the loop of line 3 (lines 6, 8)"),
        ("accelerator.backward(loss)", "loss.backward()", "got 'loss.backward()' in line 6"),
        ("accelerator.backward(loss)", "fabric.backward(loss)", "got 'fabric.backward(loss)' in line 6"),
        ("accelerator.backward(loss)", "print(accelerator.backward(loss))", "inside another in line 6"),
        ("enumerate(train_dataloader)", "enumerate(range(100))", "got 'enumerate(range(100))' in line 3"),
        ("for step, batch in enumerate(train_dataloader)", "while True", "got 'while True' in line 3"),
    ],
)
def test_a_loop_that_cannot_be_measured_says_why(before: str, after: str, problem: str) -> None:
    (loop,) = find_loops(PLAIN.replace(before, after))
    assert problem in loop.problem
    assert "\n" not in loop.problem


def test_a_backward_pass_outside_a_loop_is_no_training_loop() -> None:
    assert find_loops("accelerator.backward(loss)") == []
    assert find_loops("for x in y:\n    def step(loss):\n        accelerator.backward(loss)") == []
