"""Adapter of OneTrainer: a trainer whose validation losses are judged, and that is stopped as by its own button."""

from __future__ import annotations

from typing import Any

from dvar.stopping.integrations.trainers.held_loss import HeldLossJudge, count_processes, read_environment

PREFIX = "loss/validation_step/"
"""Of the names of OneTrainer's validation losses, one for each concept of the type VALIDATION, with fixed draws."""


def watch_trainers(trainer_type: Any) -> None:
    """Let every trainer of a class judge its validation losses once it has started, and stop by itself.

    Args:
        trainer_type: OneTrainer's `GenericTrainer`. Its method ``start`` is wrapped.
    """
    start = trainer_type.start

    def start_watched(trainer: Any) -> None:
        start(trainer)
        watch_trainer(trainer)

    trainer_type.start = start_watched


def watch_trainer(trainer: Any) -> None:
    """Let a trainer that has started judge its validation losses, and stop by itself.

    The losses are those that it writes to TensorBoard. They are judged where it reports its progress, after each batch
    and before it looks whether somebody has pressed "stop".

    Args:
        trainer: A `GenericTrainer`, with ``config``, ``model``, ``tensorboard``, ``callbacks`` and ``commands``.

    Raises:
        RefusedInput: As `read_environment`, or a setting is out of its range.
    """
    judge = HeldLossJudge(
        trainer.config.workspace_dir,
        *read_environment(),
        may_stop=count_processes() == 1,
    )
    batches_per_update = max(1, int(trainer.config.gradient_accumulation_steps))
    judge.begin(trainer.model.train_progress.global_step // batches_per_update)
    add_scalar, report_progress = trainer.tensorboard.add_scalar, trainer.callbacks.on_update_train_progress
    losses: dict[str, float] = {}

    def record_scalar(tag: str, value: Any, *args: Any, **kwargs: Any) -> None:
        add_scalar(tag, value, *args, **kwargs)
        if tag.startswith(PREFIX):
            losses[tag] = float(value)

    def judge_progress(progress: Any, *args: Any) -> None:
        report_progress(progress, *args)
        if losses and judge(progress.global_step // batches_per_update, losses):
            trainer.commands.stop()
        losses.clear()

    trainer.tensorboard.add_scalar = record_scalar
    trainer.callbacks.on_update_train_progress = judge_progress
