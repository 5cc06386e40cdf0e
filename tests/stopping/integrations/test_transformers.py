"""The callback in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from task import CAP, RATE, STOP, X, assert_as_expected, build_loss, build_monitor, build_network, record_expected_trace
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from dvar import RefusedInput, Trace
from dvar.stopping.integrations.transformers import DvarCallback


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = build_network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        # Each batch holds one point twice over: accumulated over two batches it is the task's own update.
        return {"loss": build_loss(self.net)(X).mean() + 0 * x.sum()}


def run_trainer(folder: Path, *, last: int = CAP, resume: str | None = None, seen: list[bool] | None = None) -> Any:
    model = Model()
    callback = DvarCallback(build_monitor(model.net, folder / "trace.jsonl"))

    class Sees(TrainerCallback):  # type: ignore[misc]  # untyped base
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if seen is not None:
                seen.append(model.net.training)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=last,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=1,
            max_grad_norm=0.0,
            save_steps=10,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        ),
        train_dataset=[{"x": torch.zeros(1)}] * 8,
        optimizers=(optimizer := torch.optim.SGD(model.parameters(), lr=RATE), _build_constant_schedule(optimizer)),
        callbacks=[callback, Sees()],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def _build_constant_schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trainer")
    seen: list[Any] = []
    return folder, *run_trainer(folder, seen=seen), seen


def test_it_stops_the_trainer_where_the_plain_loop_stops(done: Any) -> None:
    folder, trainer, callback, seen = done
    assert trainer.state.global_step == record_expected_trace().last_step < CAP
    assert callback.verdict == STOP(Trace.read(folder / "trace.jsonl"))
    assert callback.verdict.stop
    assert_as_expected(Trace.read(folder / "trace.jsonl"))
    assert all(seen)  # the model was put back into training mode


def test_a_killed_run_resumed_from_its_checkpoint_stops_at_the_same_step(tmp_path: Path) -> None:
    run_trainer(tmp_path, last=13)  # as if it was killed there, three updates after its checkpoint
    trainer, callback = run_trainer(tmp_path, resume=str(tmp_path / "checkpoint-10"))
    assert trainer.state.global_step == record_expected_trace().last_step
    assert callback.verdict.stop
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_a_stopped_run_that_is_resumed_does_not_train_on(done: Any) -> None:
    folder, trainer, *_ = done
    trainer._save_checkpoint(trainer.model, trial=None)
    resumed, callback = run_trainer(folder, resume=str(folder / f"checkpoint-{trainer.state.global_step}"))
    assert resumed.state.global_step == trainer.state.global_step
    assert callback.verdict.stop
    assert_as_expected(Trace.read(folder / "trace.jsonl"))


def test_a_second_training_begins_where_its_model_is_and_keeps_the_stop_request_of_another_callback(
    tmp_path: Path,
) -> None:
    _, callback = run_trainer(tmp_path, last=7)
    control, state = TrainerControl(should_training_stop=True), TrainerState(global_step=4)
    callback.on_train_begin(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, control)
    assert Trace.read(tmp_path / "trace.jsonl").steps.tolist() == [0, 1, 2, 3, 4]
    assert control.should_training_stop


@pytest.mark.parametrize("parts", ["FSDP", "DeepSpeed"])
def test_a_model_in_parts_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: str) -> None:
    callback = DvarCallback(build_monitor(build_network(), tmp_path / "trace.jsonl"))
    if parts == "FSDP":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        monkeypatch.setattr("dvar.stopping.integrations.transformers.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RefusedInput, match="needs the whole model there, got FSDP or DeepSpeed stage 3"):
        callback.on_train_begin(TrainingArguments(output_dir=str(tmp_path)), TrainerState(), TrainerControl())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("split", [{"tp_size": 2}, {"is_distributed_loading_by_transformers": True}])
def test_a_model_that_transformers_has_split_is_refused(tmp_path: Path, split: dict[str, Any]) -> None:
    callback = DvarCallback(build_monitor(build_network(), tmp_path / "trace.jsonl"))
    arguments = TrainingArguments(output_dir=str(tmp_path))
    with pytest.raises(RefusedInput, match="got a model that transformers has split: train with data parallelism only"):
        callback.on_train_begin(arguments, TrainerState(), TrainerControl(), model=SimpleNamespace(**split))
    assert list(tmp_path.iterdir()) == []
