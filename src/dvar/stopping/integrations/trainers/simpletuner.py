"""Adapter of SimpleTuner: what a custom tracker does with the values that the trainer logs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvar.stopping.integrations.trainers.held_loss import HeldLossJudge, count_processes, read_environment

PREFIX = "loss/val/"
"""Of the names under which SimpleTuner logs its evaluation losses: fixed noise and timesteps, one for each data set."""


class LoggedLossStop:
    """A stop for a program that logs its held losses and ends at ``settings.max_train_steps``.

    Args:
        settings: The trainer's settings: ``output_dir`` says where the trace goes, and ``max_train_steps`` is set to
            the present step at a stop, so that the loop ends as it does at its cap, final save included.

    Raises:
        RefusedInput: As `read_environment`, or a setting is out of its range.
    """

    def __init__(self, settings: Any) -> None:
        self._settings = settings
        self.judge = HeldLossJudge(
            settings.output_dir,
            *read_environment(),
            may_stop=count_processes() == 1,
        )

    def log(self, values: Mapping[str, Any], step: int | None) -> None:
        """Judge what the program logs after ``step`` updates."""
        if step is None:
            return
        self.judge.begin(step - 1)  # the first call comes after the first update
        losses = {name: float(value) for name, value in values.items() if name.startswith(PREFIX)}
        if losses and self.judge(step, losses):
            self._settings.max_train_steps = step
