"""Lightning: a callback of its `Trainer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.monitor import StopMonitor, from_first_rank
from dvar.stopping.verdict import Verdict

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[lightning]'", name=error.name) from None


class DvarCallback(Callback):
    """Asks `watch` before the first update and after each, and stops the `Trainer` with it: on every process, in the
    midst of an epoch, and a run that is resumed after its stop makes no further update.

    `verdict` is the newest one.  Steps are the Trainer's `global_step`, which counts updates (of all optimizers).  A
    Trainer with `min_epochs` or `min_steps` goes on until these are done, whatever any callback wishes.

    Raises: RefusedInput, as training begins, when the model lies in parts on several processes.
    """

    def __init__(self, watch: StopMonitor) -> None:
        self._watch, self.verdict = watch, watch.verdict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) or getattr(strategy, "zero_stage_3", False):
            raise RefusedInput(
                "one process measures alone, which needs the whole model there, got "
                f"{type(strategy).__name__}: train with strategy 'ddp'"
            )
        self._ask(trainer, self._watch.begin)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self._ask(trainer, self._watch)

    def _ask(self, trainer: Trainer, ask: Callable[[int], Verdict]) -> None:
        self.verdict = from_first_rank(
            lambda: ask(trainer.global_step), trainer.is_global_zero, trainer.strategy.broadcast
        )
        trainer.should_stop |= self.verdict.stop
