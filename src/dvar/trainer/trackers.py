"""Experiment trackers: they are told of every step and can never stop a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvar.trainer.loop import Step

Report = Callable[[Mapping[str, float], int], None]


@contextmanager
def tracking(name: str, folder: Path, settings: Mapping[str, Any]) -> Iterator[Callable[[Step], None]]:
    """Yield a consumer of steps that reports train_loss, L_det, ratio, grad_norm and lr to "tensorboard" or "wandb", or to "none".

    TensorBoard's files go to ``folder``/logs.  The first failure of a tracker, at its start too, is told in a warning, and it is
    left alone from then on.
    """
    report, close = _guarded(_OPENED[name], folder, settings)
    try:
        yield lambda step: report(_scalars(step), step.step)
    finally:
        close()


def _scalars(step: Step) -> dict[str, float]:
    found = {
        "train_loss": step.train_loss,
        "L_det": sum(step.eval) / len(step.eval) if step.eval else None,
        "ratio": step.verdict.metrics.get("ratio"),
        "grad_norm": step.grad_norm,
        "lr": step.lr,
    }
    return {name: value for name, value in found.items() if value is not None}


def _guarded(
    opened: Callable[..., tuple[Report, Callable[[], None]]], folder: Path, settings: Mapping[str, Any]
) -> tuple[Report, Callable[[], None]]:
    failed = False

    def guard(call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            nonlocal failed
            if failed:
                return None
            try:
                return call(*arguments)
            except Exception as error:  # whatever a tracker meets, the run goes on
                failed = True
                warnings.warn(f"the tracker failed and is left alone from now on: {error}", stacklevel=2)
                return None

        return guarded

    tracker = guard(opened)(folder, settings) or _none(folder, settings)
    return guard(tracker[0]), guard(tracker[1])


def _none(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    return lambda scalars, step: None, lambda: None


def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "logs"))

    def report(scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return report, writer.close


def _wandb(folder: Path, settings: Mapping[str, Any]) -> tuple[Report, Callable[[], None]]:
    import wandb

    run = wandb.init(project="dvar", dir=str(folder), config=dict(settings))
    return lambda scalars, step: run.log(dict(scalars), step=step), run.finish


_OPENED = {"none": _none, "tensorboard": _tensorboard, "wandb": _wandb}
