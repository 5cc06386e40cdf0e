"""Trainers whose own loop runs on two gloo processes: the first judges, both stop at the same step."""

from __future__ import annotations

from pathlib import Path

import pytest
from task import CAP, assert_as_expected, record_expected_trace
from two_processes import work_on_two

from dvar import Trace, Verdict

HEAD = """
import json, os, sys
from pathlib import Path

import torch
from torch import nn

from task import CAP, RATE, X, build_loss, build_monitor, build_network

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
net = build_network()
monitor = build_monitor(net, folder / "trace.jsonl")
"""

TRAINS = {
    "transformers": """
from transformers import Trainer, TrainingArguments
from dvar.stopping.integrations.transformers import DvarCallback

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        return {"loss": build_loss(self.net)(X).mean() + 0 * x.sum()}

model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
callback = DvarCallback(monitor)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir=str(folder / "output"), max_steps=CAP, gradient_accumulation_steps=2, max_grad_norm=0.0,
        per_device_train_batch_size=1, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no",
        save_strategy="no",
    ),
    train_dataset=[{"x": torch.zeros(1)}] * 8,
    optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    callbacks=[callback],
)
trainer.train()
step, kind = trainer.state.global_step, type(trainer.model_wrapped).__name__
""",
    "lightning": """
from lightning.pytorch import LightningModule, Trainer
from dvar.stopping.integrations.lightning import DvarCallback

class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        self.kind = type(self.trainer.strategy.model).__name__
        return build_loss(self.net)(X).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)

callback = DvarCallback(monitor)
trainer = Trainer(
    max_steps=CAP, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, callbacks=[callback],
)
trainer.fit(model := Model(), torch.utils.data.DataLoader([torch.zeros(1)] * 14))
step, kind = trainer.global_step, model.kind
""",
    "ignite": """
import ignite.distributed as idist
from ignite.engine import Engine
from dvar.stopping.integrations.ignite import DvarHandler

idist.initialize("gloo")
model = idist.auto_model(net)
optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

def update(engine, batch):
    optimizer.zero_grad()
    build_loss(model)(X).mean().backward()
    optimizer.step()

engine, callback = Engine(update), DvarHandler(monitor)
callback.attach(engine)
engine.run(range(7), max_epochs=CAP)
step, kind = engine.state.iteration, type(model).__name__
idist.finalize()
""",
}

TAIL = """
outcome = {"kind": kind, "step": step, "verdict": callback.verdict.to_json(), "records": len(monitor.trace)}
(folder / f"outcome-{rank}.json").write_text(json.dumps(outcome))
"""


@pytest.mark.slow
@pytest.mark.parametrize("host", TRAINS)
def test_two_processes_stop_at_the_same_step_by_the_verdict_of_the_first(host: str, tmp_path: Path) -> None:
    first, other = work_on_two(HEAD + TRAINS[host] + TAIL, tmp_path)
    assert first["kind"] == other["kind"] == "DistributedDataParallel"
    assert first["step"] == other["step"] == record_expected_trace().last_step < CAP
    assert first["verdict"] == other["verdict"]
    assert Verdict.from_json(first["verdict"]).stop
    # The second process neither measures nor writes.
    assert (first["records"], other["records"]) == (len(record_expected_trace()), 0)
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))
