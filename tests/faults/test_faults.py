"""Faults while training: out of memory, non-finite losses and gradients, trackers and consumers that raise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from short_run import Outcome, resume_run
from torch import Tensor

import dvar.training.run
import dvar.training.trackers
from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.objective import denoising_loss
from dvar.errors import OutOfResources
from dvar.stopping.diagnosis import Reason
from dvar.training.checkpoint import latest_checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise

pytestmark = pytest.mark.usefixtures("cached_model")


def change_losses_at(patch: pytest.MonkeyPatch, number: int, change: Callable[[Tensor], Tensor]) -> None:
    """Apply ``change`` to the losses of this call of the objective."""
    original, count = denoising_loss, iter(range(10**6))

    def loss(*arguments: Any) -> Tensor:
        return change(original(*arguments)) if next(count) == number else original(*arguments)

    patch.setattr(dvar.training.run, "denoising_loss", loss)


def raise_cuda_out_of_memory(losses: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def allocate_petabyte(losses: Tensor) -> Tensor:
    return losses + torch.empty(1 << 50).sum()  # a petabyte, which torch's own allocator refuses


@pytest.mark.parametrize("exhaust_memory", [raise_cuda_out_of_memory, allocate_petabyte])
def test_out_of_memory_is_reported_with_remedies_and_the_run_resumes(
    config: TextualInversionConfig, reference: Outcome, exhaust_memory: Callable[[Tensor], Tensor]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        change_losses_at(patch, 13, exhaust_memory)
        with pytest.raises(OutOfResources) as error:
            personalise(config)
    assert "\n" not in str(error.value)
    for remedy in ("--gradient_checkpointing", "--mixed_precision bf16", "--train_batch_size 1"):
        assert remedy in str(error.value)
    assert latest_checkpoint(Path(config.output_dir)).step == 4
    assert resume_run(config) == reference


def test_remedies_already_in_use_are_not_suggested(config: TextualInversionConfig) -> None:
    settings = replace(
        config, gradient_checkpointing=True, mixed_precision="bf16", train_batch_size=1, attention_slicing=True
    )
    with pytest.MonkeyPatch.context() as patch:
        change_losses_at(patch, 0, raise_cuda_out_of_memory)
        with pytest.raises(OutOfResources) as error:
            personalise(replace(settings, eval_batch_size=1))
    assert str(error.value) == "the memory does not suffice: try --quantize nf4, --offload"


def test_an_unrelated_error_is_not_hidden(config: TextualInversionConfig) -> None:
    def raise_error(losses: Tensor) -> Tensor:
        raise RuntimeError("shapes do not match")

    with pytest.MonkeyPatch.context() as patch:
        change_losses_at(patch, 3, raise_error)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            personalise(config)


def make_gradient_infinite(losses: Tensor) -> Tensor:
    zero = losses - losses.detach()
    return losses + zero.sqrt()  # nothing is added, and its gradient is infinite


def make_loss_nan(losses: Tensor) -> Tensor:
    return losses * float("nan")


# Call 0 evaluates the untouched model; then come an update and its evaluation in turn: 11 is update 6.
@pytest.mark.parametrize("corrupt", [make_gradient_infinite, make_loss_nan])
def test_a_non_finite_loss_or_gradient_ends_the_run_and_names_its_step(
    config: TextualInversionConfig, corrupt: Callable[[Tensor], Tensor]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        change_losses_at(patch, 11, corrupt)
        result = personalise(replace(config, checkpointing_steps=1, best_by="stop"))
    assert result.verdict.reason is Reason.NON_FINITE
    assert result.verdict.step == result.steps == 6
    assert "step 6" in result.verdict.sentence
    checkpoint = latest_checkpoint(result.folder)
    assert checkpoint.step == result.best_step == 5
    assert torch.equal(Outcome.of(result.folder).vectors, checkpoint.state["<thing>"])


def test_a_tracker_that_raises_is_disabled_and_changes_nothing(
    config: TextualInversionConfig, reference: Outcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def report(scalars: dict[str, float], step: int) -> None:
        steps.append(step)
        if step == 3:
            raise ConnectionError("the server is gone")

    tracker = (report, lambda: steps.append(-1))
    monkeypatch.setitem(dvar.training.trackers._BACKENDS, "none", lambda folder, settings: tracker)
    with pytest.warns(UserWarning, match="the tracker failed and is disabled from now on: the server is gone"):
        folder = personalise(config).folder
    assert steps == [0, 1, 2, 3]
    assert Outcome.of(folder) == reference


def test_a_run_resumes_after_a_consumer_raises(config: TextualInversionConfig, reference: Outcome) -> None:
    def fail(step: StepRecord) -> None:
        if step.step == 6:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        personalise(config, [fail])
    assert resume_run(config) == reference
