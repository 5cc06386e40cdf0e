"""Keras: a callback of `fit`."""

from __future__ import annotations

from typing import Any

from dvar.stopping.monitor import StopMonitor
from dvar.stopping.verdict import Verdict

try:
    from keras.callbacks import Callback
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[keras]'", name=error.name) from None


class DvarCallback(Callback):
    """Asks `watch` before the first update and after each, and stops `fit`, in the midst of an epoch.

    `verdict` is the newest one.  A `Probe` needs Keras on PyTorch.  With any backend, a watch without a probe records
    what an epoch ends with instead, under its names in Keras: `Dvar(310, 0.15, metric="val_loss")` judges that.  Steps
    are the optimizer's `iterations`, which a saved model keeps; gradients that are accumulated count once.
    """

    def __init__(self, watch: StopMonitor) -> None:
        super().__init__()
        self._watch, self.verdict = watch, watch.verdict

    def on_train_begin(self, logs: Any = None) -> None:
        self._obey(self._watch.begin(self._step))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._obey(self._watch(self._step))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._watch.probe is None:
            self._obey(self._watch(self._step, **(logs or {})))

    def _obey(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.model.stop_training |= verdict.stop

    @property
    def _step(self) -> int:
        return int(self.model.optimizer.iterations)
