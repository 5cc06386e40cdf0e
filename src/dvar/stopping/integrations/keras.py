"""Integration with Keras: a callback of `fit`."""

from __future__ import annotations

from typing import Any

from dvar.stopping.monitor import StopMonitor
from dvar.stopping.verdict import Verdict

try:
    from keras.callbacks import Callback
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[keras]'", name=error.name) from None


class DvarCallback(Callback):  # type: ignore[misc]  # untyped base
    """A callback that judges before the first update and after each, and stops `fit` at once, also within an epoch.

    The attribute ``verdict`` is the newest one. A `Probe` needs Keras on PyTorch. With any backend, a monitor without a
    probe records the logs at the end of each epoch instead, under their names in Keras; a rule such as
    ``Dvar(310, 0.15, metric="val_loss")`` judges them. Steps are the optimizer's ``iterations``, which a saved model
    keeps; accumulated gradients count once. A run that Keras's ``BackupAndRestore`` resumes after its stop may make one
    more update.

    Args:
        monitor: The monitor.
    """

    def __init__(self, monitor: StopMonitor) -> None:
        super().__init__()
        self._monitor, self.verdict, self._begun = monitor, monitor.verdict, False

    def on_train_begin(self, logs: Any = None) -> None:
        # At step 0 the trace of a run that goes on would be moved aside, and a callback after this one, such as Keras's
        # BackupAndRestore, may be about to restore its step.
        self._begun = self._step > 0 or not self._monitor.path.exists()
        if self._begun:
            self._apply(self._monitor.begin(self._step))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if not self._begun:
            self._begun = True
            self._apply(self._monitor.begin(self._step))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._apply(self._monitor(self._step))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._monitor.probe is None:
            self._apply(self._monitor(self._step, **(logs or {})))

    def _apply(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.model.stop_training |= verdict.stop

    @property
    def _step(self) -> int:
        return int(self.model.optimizer.iterations)
