"""The judge that all adapters of trainers share: a held loss that the trainer has measured, and a rule."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dvar.errors import RefusedInput, first_line
from dvar.stopping.monitor import StopMonitor
from dvar.stopping.rules import Dvar, Rule
from dvar.stopping.verdict import Verdict

METRIC = "held_loss"
"""The name under which the losses are in the trace."""
POOLED = ("pooled", "total_average")
"""Last parts of the names of a loss over all images, by which SimpleTuner and OneTrainer log it beside the others."""


class HeldLossJudge:
    """A judge of held losses that a trainer measures; a fault of the judge never ends the training.

    ``judge(step, losses)`` is true from the first step at which the rule stops. A fault, such as a full disk, is
    printed once; from then on the judge is off, its answer is False, and training goes on.

    Args:
        folder: Where to keep the trace, `trace.jsonl`: the folder of the run. The file is what a resume needs.
        window: DVAR's window, in steps.
        threshold: DVAR's threshold.
        may_stop: False where this process alone cannot end the training, because others would wait for it. A stop is
            then printed and no more.

    Raises:
        RefusedInput: A setting of the rule is wrong.
    """

    def __init__(
        self, folder: str | os.PathLike[str], window: int = 310, threshold: float = 0.15, *, may_stop: bool = True
    ) -> None:
        self.rule: Rule = Dvar(window, threshold, metric=METRIC)
        self._monitor = StopMonitor(self.rule, None, Path(folder) / "trace.jsonl")
        self._may_stop, self._off, self._begun, self._printed = may_stop, False, False, False

    @property
    def verdict(self) -> Verdict:
        """The newest verdict."""
        return self._monitor.verdict

    def begin(self, step: int) -> None:
        """Open the trace at the step at which the run starts or is resumed; later calls do nothing."""
        if not self._begun and not self._off:
            self._begun = True
            try:
                self._monitor.begin(step)
            except Exception as error:
                self._switch_off(error)

    def __call__(self, step: int, losses: float | Mapping[str, float]) -> bool:
        """Record the held loss after ``step`` updates and return whether to stop.

        Args:
            step: Number of updates made so far in the whole run.
            losses: The loss, or losses of several sets of images by name: that over all of them, where its name ends in
                one of `POOLED`, or else their mean.
        """
        self.begin(step)
        if self._off:
            return False
        try:
            trace = self._monitor.trace
            if not (len(trace) and step <= trace.last_step):  # a trainer may measure twice at one step
                self._monitor(step, **{METRIC: pool_losses(losses)})
        except Exception as error:
            self._switch_off(error)
            return False
        if self.verdict.stop and not self._printed:
            self._printed = True
            print(f"dvar: {self.verdict}", flush=True)
            if not self._may_stop:
                print("dvar: several processes train, and this one cannot stop them all: stop them by hand", flush=True)
        return self.verdict.stop and self._may_stop

    def _switch_off(self, error: Exception) -> None:
        self._off = True
        print(f"dvar: {first_line(error)}: training goes on without a stopping rule", flush=True)


def pool_losses(losses: float | Mapping[str, float]) -> float:
    """Return one loss of several: that over all images where there is one, or else the mean."""
    if not isinstance(losses, Mapping):
        return float(losses)
    pooled = [loss for name, loss in losses.items() if name.rpartition("/")[2] in POOLED]
    values = pooled[:1] or list(losses.values())
    return float(sum(values) / len(values))


def read_environment() -> tuple[int, float]:
    """Return window and threshold from DVAR_WINDOW and DVAR_THRESHOLD, for trainers whose config has no place for them.

    Raises:
        RefusedInput: One of them is no number.
    """
    window, threshold = os.environ.get("DVAR_WINDOW", "310"), os.environ.get("DVAR_THRESHOLD", "0.15")
    try:
        return int(window), float(threshold)
    except ValueError as error:
        raise RefusedInput(
            [f"DVAR_WINDOW and DVAR_THRESHOLD must be numbers, got {window!r} and {threshold!r}: correct or unset them"]
        ) from error


def count_processes() -> int:
    """Return the number of processes that train together: of the group, if there is one, or as torchrun says it."""
    torch = sys.modules.get("torch")  # by which a trainer has joined the group, with or without torchrun
    if torch and torch.distributed.is_available() and torch.distributed.is_initialized():
        return int(torch.distributed.get_world_size())
    return int(os.environ.get("WORLD_SIZE", "1"))
