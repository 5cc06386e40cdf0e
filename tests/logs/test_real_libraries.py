"""Logs that MLflow, trackio and W&B themselves write; each is skipped where the library is not installed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dvar.logs.formats import find_log, recognise_format
from dvar.logs.reader import read_log

CURVE = {step: 0.1 + 0.01 * math.exp(-step / 40) for step in range(0, 60, 2)}


def check_log(log: Path, title: str) -> None:
    assert recognise_format(find_log(log)).title.startswith(title)
    trace = read_log(log)
    assert dict(zip(trace.steps.tolist(), trace.values.tolist(), strict=True)) == CURVE


@pytest.mark.parametrize(
    ("store", "title"), [("mlruns", "the folder of a run in MLflow"), ("mlflow.db", "MLflow's database")]
)
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, title: str) -> None:
    mlflow = pytest.importorskip("mlflow")
    if store == "mlflow.db":
        pytest.importorskip("sqlalchemy")
        pytest.importorskip("alembic")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / store}" if store == "mlflow.db" else (tmp_path / store).as_uri())
    mlflow.set_experiment("mug")
    with mlflow.start_run():
        for step, value in CURVE.items():
            mlflow.log_metrics({"train_loss": 0.5, "val/loss": value}, step=step)
    check_log(tmp_path / store, title)


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    trackio.init(project="mug", name="mug-3")
    for step, value in CURVE.items():
        trackio.log({"train_loss": 0.5, "val_loss": value}, step=step)
    trackio.finish()
    check_log(next(tmp_path.glob("*.db")), "trackio")


@pytest.mark.filterwarnings("ignore")
def test_a_run_of_wandb(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb")
    with wandb.init(mode="offline", project="mug", dir=tmp_path, settings=wandb.Settings(silent=True)) as run:
        for step, value in CURVE.items():
            run.log({"train/loss": 0.5, "val/loss": value}, step=step)
    wandb.teardown()  # only then is all on the disk
    check_log(next(tmp_path.glob("wandb/offline-run-*")), "the file run-ID.wandb")
