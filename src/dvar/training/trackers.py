"""Experiment trackers: they are told of every step and can never stop a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvar.training.loop import StepRecord

Settings = Mapping[str, Any]
Opened = tuple[Callable[[dict[str, float], int], None], Callable[[], None]]
"""(report scalars at a step, close)."""


class Tracker:
    """A consumer of steps that reports train_loss, L_det, ratio, grad_norm and lr to "tensorboard", "wandb" or "none".

    TensorBoard's files go to ``folder``/logs.  Whatever fails in a tracker is told once, in a warning, and the
    tracker is left alone from then on.
    """

    def __init__(self, name: str, folder: Path, settings: Settings) -> None:
        self._opened: Opened | None = None
        with self._left_alone_on_failure():
            self._opened = _OPENED[name](folder, settings)

    def __call__(self, step: StepRecord) -> None:
        with self._left_alone_on_failure():
            if self._opened:
                self._opened[0](_scalars(step), step.step)

    def close(self) -> None:
        """Let the tracker finish what it has."""
        with self._left_alone_on_failure():
            if self._opened:
                self._opened[1]()

    @contextmanager
    def _left_alone_on_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a tracker raises whatever it meets, and the run matters more
            self._opened = None
            warnings.warn(f"the tracker failed and is left alone from now on: {error}", stacklevel=4)


def _scalars(step: StepRecord) -> dict[str, float]:
    found = {
        "train_loss": step.train_loss,
        "L_det": sum(step.eval) / len(step.eval) if step.eval else None,
        "ratio": step.verdict.metrics.get("ratio"),
        "grad_norm": step.grad_norm,
        "lr": step.lr,
    }
    return {name: value for name, value in found.items() if value is not None}


def _tensorboard(folder: Path, settings: Settings) -> Opened:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "logs"))

    def report(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return report, writer.close


def _wandb(folder: Path, settings: Settings) -> Opened:
    import wandb

    run = wandb.init(project="dvar", dir=str(folder), config=dict(settings))
    return lambda scalars, step: run.log(scalars, step=step), run.finish


_OPENED: dict[str, Callable[[Path, Settings], Opened | None]] = {
    "none": lambda folder, settings: None,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
