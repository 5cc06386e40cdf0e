"""Integration with Lightning: a callback of its `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, broadcast_verdict
from dvar.stopping.verdict import Verdict

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[lightning]'", name=error.name) from None


class DvarCallback(Callback):  # type: ignore[misc]  # untyped base
    """A callback that judges before the first update and after each, and stops the `Trainer` on every process.

    It stops at once, also within an epoch, and a run that is resumed after its stop makes no further update. The
    attribute ``verdict`` is the newest one. Steps are the Trainer's ``global_step``, which counts updates (of all
    optimizers). A Trainer with ``min_epochs`` or ``min_steps`` continues until these are reached.

    Args:
        monitor: The monitor.

    Raises:
        RefusedInput: As training begins: the model is sharded over several processes.
    """

    def __init__(self, monitor: StopMonitor) -> None:
        self._monitor, self.verdict = monitor, monitor.verdict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False):
            raise RefusedInput(
                "one process measures alone, which needs the whole model there, got "
                f"{type(strategy).__name__}: train with strategy 'ddp'"
            )
        self._judge(trainer, self._monitor.begin)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._judge(trainer, self._monitor)

    def _judge(self, trainer: Trainer, judge: Callable[[int], Verdict]) -> None:
        self.verdict = broadcast_verdict(
            lambda: judge(trainer.global_step), trainer.is_global_zero, trainer.strategy.broadcast
        )
        trainer.should_stop |= self.verdict.stop
