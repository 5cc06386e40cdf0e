"""Trackers: the scalars they receive, and what happens when they fail."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dvar.stopping.diagnosis import Reason
from dvar.stopping.verdict import Verdict
from dvar.training.loop import StepRecord
from dvar.training.trackers import Tracker

SECONDS = {"train": 0.1, "probe": 0.1, "other": 0.1}
VERDICT = Verdict(False, Reason.RUNNING, 1, "Dvar()", {"ratio": 0.5})
STEPS = (
    StepRecord(0, None, (0.5, 0.3), VERDICT, None, None, SECONDS),
    StepRecord(1, 0.25, None, VERDICT, 2.0, 0.01, SECONDS),
)
SCALARS = [
    (0, {"L_det": 0.4, "ratio": 0.5}),
    (1, {"train_loss": 0.25, "ratio": 0.5, "grad_norm": 2.0, "lr": 0.01}),
]


class Writer:
    """A fake client of both trackers."""

    def __init__(self) -> None:
        self.scalars: dict[int, dict[str, float]] = {}
        self.closed = self.failing = False
        self.calls = 0
        self.folder = ""

    def log(self, scalars: dict[str, float], step: int) -> None:
        self.calls += 1
        if self.failing:
            raise ConnectionError("no network")
        self.scalars.setdefault(step, {}).update(scalars)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.log({name: value}, step)

    def close(self) -> None:
        self.closed = True

    finish = close


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Writer:
    fake = Writer()
    module: Any = ModuleType("torch.utils.tensorboard")

    def open_writer(folder: str) -> Writer:
        fake.folder = folder
        return fake

    def init(**options: Any) -> Writer:
        fake.folder = options["dir"]
        return fake

    module.SummaryWriter = open_writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    client: Any = SimpleNamespace(init=init)
    monkeypatch.setitem(sys.modules, "wandb", client)
    return fake


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_receives_the_scalars_of_each_step(writer: Writer, name: str, tmp_path: Path) -> None:
    tracker = Tracker(name, tmp_path, {"seed": 3})
    for step in STEPS:
        tracker(step)
    assert sorted(writer.scalars.items()) == SCALARS
    assert not writer.closed
    tracker.close()
    assert writer.closed
    assert writer.folder.startswith(str(tmp_path))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_failing_tracker_is_called_once_and_then_disabled(writer: Writer, name: str, tmp_path: Path) -> None:
    writer.failing = True
    tracker = Tracker(name, tmp_path, {})
    with pytest.warns(UserWarning, match="the tracker failed .* no network"):
        tracker(STEPS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker(STEPS[1])
        tracker.close()
    assert writer.calls == 1


def test_a_tracker_that_cannot_start_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.warns(UserWarning, match="the tracker failed"):
        tracker = Tracker("wandb", tmp_path, {})
    tracker(STEPS[0])
    tracker.close()


def test_no_tracker_writes_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tracker = Tracker("none", tmp_path, {})
    tracker(STEPS[0])
    tracker.close()
    assert not recwarn.list
    assert not list(tmp_path.iterdir())
