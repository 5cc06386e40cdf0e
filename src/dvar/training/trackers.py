"""Experiment trackers, which receive every step and can never stop a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar.training.run_layout import TRACKER_LOGS

if TYPE_CHECKING:
    from dvar.training.loop import StepRecord

Settings = Mapping[str, Any]
Backend = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""(report scalars at a step, close)."""


class Tracker:
    """A consumer of steps that reports train_loss, L_det, ratio, grad_norm and lr.

    Whatever fails in a tracker is warned of once, and the tracker is not used any more.

    Args:
        name: "tensorboard", "wandb" or "none".
        folder: The folder of the run; TensorBoard's files go to its folder "logs".
        settings: The settings of the run.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        self._backend: Backend | None = None
        with self._disable_on_failure():
            self._backend = _BACKENDS[name](folder, settings)

    def __call__(self, step: StepRecord) -> None:
        """Report a step."""
        with self._disable_on_failure():
            if self._backend:
                self._backend[0](_scalars(step), step.step)

    def close(self) -> None:
        """Let the tracker finish what it has."""
        with self._disable_on_failure():
            if self._backend:
                self._backend[1]()

    @contextmanager
    def _disable_on_failure(self) -> Iterator[None]:
        """Disable the tracker, with a warning, if the scope fails."""
        try:
            yield
        except Exception as error:  # a tracker raises whatever it meets, and the run matters more
            self._backend = None
            warnings.warn(f"the tracker failed and is disabled from now on: {error}", stacklevel=4)


def _scalars(step: StepRecord) -> dict[str, float]:
    """Return what is reported of a step, without what it has not."""
    scalars = {
        "train_loss": step.train_loss,
        "L_det": sum(step.eval) / len(step.eval) if step.eval else None,
        "ratio": step.verdict.metrics.get("ratio"),
        "grad_norm": step.grad_norm,
        "lr": step.lr,
    }
    return {name: value for name, value in scalars.items() if value is not None}


def _open_tensorboard(folder: Path, settings: Settings) -> Backend:
    """Return the backend that writes TensorBoard's files."""
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder / TRACKER_LOGS))

    def report(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return report, writer.close


def _open_wandb(folder: Path, settings: Settings) -> Backend:
    """Return the backend that reports to Weights & Biases."""
    import wandb

    run = wandb.init(project="dvar", dir=str(folder), config=dict(settings))
    return lambda scalars, step: run.log(scalars, step=step), run.finish


_BACKENDS: dict[str, Callable[[Path, Settings], Backend | None]] = {
    "none": lambda folder, settings: None,
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
}
