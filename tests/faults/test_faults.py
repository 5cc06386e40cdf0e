"""What else befalls a run: memory that runs out, gradients that are no numbers, trackers that raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import Outcome, gone_on
from torch import Tensor

import dvar.training.run
import dvar.training.trackers
from dvar.config.training import TextualInversionConfig
from dvar.diffusion.objective import denoising_loss
from dvar.errors import OutOfResources
from dvar.stopping.diagnosis import Reason
from dvar.training.checkpoint import latest_checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise

pytestmark = pytest.mark.usefixtures("loaded_at_once")


def at_call(patch: pytest.MonkeyPatch, number: int, change: Callable[[Tensor], Tensor]) -> None:
    """Let the objective's call of this number pass through ``change``."""
    true, count = denoising_loss, iter(range(10**6))

    def loss(*given: Any) -> Tensor:
        return change(true(*given)) if next(count) == number else true(*given)

    patch.setattr(dvar.training.run, "denoising_loss", loss)


def cuda_full(losses: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def cpu_full(losses: Tensor) -> Tensor:
    return losses + torch.empty(1 << 50).sum()  # a petabyte, which torch's own allocator refuses


@pytest.mark.parametrize("full", [cuda_full, cpu_full])
def test_memory_that_runs_out_is_told_with_the_remedy_and_the_run_goes_on(
    config: TextualInversionConfig, straight: Outcome, full: Callable[[Tensor], Tensor]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 13, full)
        with pytest.raises(OutOfResources) as told:
            personalise(config)
    assert "\n" not in str(told.value)
    for remedy in ("--gradient_checkpointing", "--mixed_precision bf16", "--train_batch_size 1"):
        assert remedy in str(told.value)
    assert latest_checkpoint(Path(config.output_dir)).step == 4
    assert gone_on(config) == straight


def test_the_remedies_are_those_that_are_not_taken_yet(config: TextualInversionConfig) -> None:
    modest = replace(
        config, gradient_checkpointing=True, mixed_precision="bf16", train_batch_size=1, attention_slicing=True
    )
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 0, cuda_full)
        with pytest.raises(OutOfResources) as told:
            personalise(replace(modest, eval_batch_size=1))
    assert str(told.value) == "the memory does not suffice: try a lower --resolution"


def test_an_error_of_our_own_is_not_hidden(config: TextualInversionConfig) -> None:
    def fault(losses: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 3, fault)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            personalise(config)


def gradient_lost(losses: Tensor) -> Tensor:
    zero = losses - losses.detach()
    return losses + zero.sqrt()  # nothing is added, and its gradient is infinite


def loss_lost(losses: Tensor) -> Tensor:
    return losses * float("nan")


# Call 0 evaluates the untouched model; then come an update and its evaluation in turn: 11 is update 6.
@pytest.mark.parametrize("lost", [gradient_lost, loss_lost])
def test_a_loss_or_gradient_that_is_no_number_ends_the_run_with_its_step(
    config: TextualInversionConfig, lost: Callable[[Tensor], Tensor]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        at_call(patch, 11, lost)
        result = personalise(replace(config, checkpointing_steps=1, best_by="stop"))
    assert result.verdict.reason is Reason.NON_FINITE
    assert result.verdict.step == result.steps == 6
    assert "step 6" in result.verdict.sentence
    last = latest_checkpoint(result.folder)
    assert last.step == result.best_step == 5
    assert torch.equal(Outcome.of(result.folder).vectors, last.state["<thing>"])


def test_a_tracker_that_raises_is_left_alone_and_changes_nothing(
    config: TextualInversionConfig, straight: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []

    def report(scalars: dict[str, float], step: int) -> None:
        told.append(step)
        if step == 3:
            raise ConnectionError("the server is gone")

    opened = (report, lambda: told.append(-1))
    monkeypatch.setitem(dvar.training.trackers._BACKENDS, "none", lambda folder, settings: opened)
    with pytest.warns(UserWarning, match="the tracker failed and is disabled from now on: the server is gone"):
        folder = personalise(config).folder
    assert told == [0, 1, 2, 3]
    assert Outcome.of(folder) == straight


def test_a_consumer_that_raises_leaves_a_run_that_goes_on(config: TextualInversionConfig, straight: Outcome) -> None:
    def fail(step: StepRecord) -> None:
        if step.step == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        personalise(config, [fail])
    assert gone_on(config) == straight
