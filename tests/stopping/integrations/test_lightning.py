"""The callback in a real Lightning Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from task import CAP, RATE, STOP, X, assert_as_expected, build_loss, build_monitor, build_network, record_expected_trace
from torch import Tensor

from dvar import RefusedInput, Trace
from dvar.stopping.integrations.lightning import DvarCallback

# What Lightning says of a resume within an epoch, and of a folder of checkpoints that is used again.
pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Model(LightningModule):  # type: ignore[misc]  # untyped base
    def __init__(self) -> None:
        super().__init__()
        self.net = build_network()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        assert self.net.training
        return build_loss(self.net)(X).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def fit_model(folder: Path, *, last: int = CAP, resume: Path | None = None, accumulate: int = 1, **more: Any) -> Any:
    model = Model()
    callback = DvarCallback(build_monitor(model.net, folder / "trace.jsonl"))
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=10, save_top_k=-1)
    trainer = Trainer(
        max_steps=last,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[saves, callback],
        **more,
    )
    trainer.fit(
        model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(14, 1))), ckpt_path=resume
    )
    return trainer, callback


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_stops_the_trainer_where_the_plain_loop_stops(tmp_path: Path, accumulate: int) -> None:
    trainer, callback = fit_model(tmp_path, accumulate=accumulate)
    assert trainer.global_step == record_expected_trace().last_step < CAP
    assert callback.verdict == STOP(Trace.read(tmp_path / "trace.jsonl"))
    assert callback.verdict.stop
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_a_killed_run_resumed_from_its_checkpoint_stops_at_the_same_step(tmp_path: Path) -> None:
    fit_model(tmp_path, last=13)
    trainer, _ = fit_model(tmp_path, resume=tmp_path / "step=10.ckpt")
    assert trainer.global_step == record_expected_trace().last_step
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_a_stopped_run_that_is_resumed_makes_no_further_update(tmp_path: Path) -> None:
    trainer, _ = fit_model(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
    resumed, callback = fit_model(tmp_path, resume=tmp_path / "last.ckpt")
    assert resumed.global_step == trainer.global_step
    assert callback.verdict.stop
    assert all(torch.equal(value, before[name]) for name, value in resumed.lightning_module.state_dict().items())


class Third:
    """Stands for DeepSpeed's strategy, which cannot be made without DeepSpeed."""

    zero_stage_3 = True


@pytest.mark.parametrize(
    "strategy", [FSDPStrategy(), ModelParallelStrategy(), Third()], ids=lambda it: type(it).__name__
)
def test_a_model_in_parts_is_refused(tmp_path: Path, strategy: Any) -> None:
    callback = DvarCallback(build_monitor(build_network(), tmp_path / "trace.jsonl"))
    message = f"needs the whole model there, got {type(strategy).__name__}: train with strategy 'ddp'"
    with pytest.raises(RefusedInput, match=message):
        callback.on_train_start(SimpleNamespace(strategy=strategy), Model())
    assert list(tmp_path.iterdir()) == []


def test_a_second_fit_begins_where_its_model_is_and_keeps_the_stop_request_of_another_callback(tmp_path: Path) -> None:
    _, callback = fit_model(tmp_path, last=7)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    back = SimpleNamespace(strategy=strategy, global_step=4, is_global_zero=True, should_stop=True)
    callback.on_train_start(back, Model())
    assert Trace.read(tmp_path / "trace.jsonl").steps.tolist() == [0, 1, 2, 3, 4]
    assert back.should_stop
