"""Two real processes under accelerate: one judges, both stop at the same step, and a failure of one ends both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from task import CAP, STOP, assert_as_expected, build_monitor, build_network, record_expected_trace
from two_processes import work_on_two

from dvar import RefusedInput, Trace, Verdict
from dvar.stopping.integrations.accelerate import judge_together

WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from dvar import DvarError
from dvar.stopping.integrations.accelerate import judge_together
from task import CAP, RATE, X, build_loss, build_monitor, build_network

folder = Path(sys.argv[1])
accelerator = Accelerator(
    cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))]
)
net = build_network()
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=RATE))
monitor = build_monitor(accelerator.unwrap_model(model), folder / "trace.jsonl")
step, verdict = 0, judge_together(accelerator, monitor, 0)
while not verdict.stop and step < CAP:
    with accelerator.accumulate(model):
        accelerator.backward(build_loss(model)(X).mean())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        verdict = judge_together(accelerator, monitor, step)
outcome = {"kind": type(model).__name__, "step": step, "verdict": verdict.to_json(), "records": len(monitor.trace)}

faulty = build_monitor(accelerator.unwrap_model(model), folder / "faulty.jsonl")
faulty.probe = lambda: 1 / 0
try:
    judge_together(accelerator, faulty, 0)
except (ZeroDivisionError, DvarError) as error:
    outcome |= {"error": type(error).__name__, "message": str(error)}
(folder / f"outcome-{accelerator.process_index}.json").write_text(json.dumps(outcome))
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[dict[str, Any]]:
    return work_on_two(WORKER, folder)


def test_two_processes_stop_at_the_same_step_by_the_verdict_of_the_first(
    folder: Path, outcomes: list[dict[str, Any]]
) -> None:
    first, other = outcomes
    assert first["kind"] == other["kind"] == "DistributedDataParallel"
    assert first["step"] == other["step"] == record_expected_trace().last_step < CAP
    assert Verdict.from_json(first["verdict"]) == Verdict.from_json(other["verdict"])
    assert first["verdict"] == other["verdict"]
    assert (first["records"], other["records"]) == (
        len(record_expected_trace()),
        0,
    )  # the second one neither measures nor writes
    assert_as_expected(Trace.read(folder / "trace.jsonl"))


def test_a_failure_of_the_first_process_is_one_of_the_other_too(outcomes: list[dict[str, Any]]) -> None:
    first, other = outcomes
    message = "division by zero"
    assert (first["error"], first["message"]) == ("ZeroDivisionError", message)
    assert (other["error"], other["message"]) == (
        "DvarError",
        f"the first rank could not judge: ZeroDivisionError: {message}",
    )


def test_one_process_needs_no_other(tmp_path: Path) -> None:
    accelerator, net = Accelerator(cpu=True), build_network()
    monitor = build_monitor(net, tmp_path / "trace.jsonl")
    assert judge_together(accelerator, monitor, 0) == STOP(monitor.trace)
    assert len(monitor.trace) == 1


@pytest.mark.parametrize(("kind", "stage"), [("FSDP", 0), ("MEGATRON_LM", 0), ("DEEPSPEED", 3)])
def test_a_model_in_parts_is_refused(tmp_path: Path, kind: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType(kind))
    plugins = {"only": SimpleNamespace(zero_stage=stage, selected=True)}
    monkeypatch.setitem(accelerator.state._shared_state, "deepspeed_plugins", plugins)
    with pytest.raises(RefusedInput, match=f"needs the whole model there, got {kind}: measure the loss on all proc"):
        judge_together(accelerator, build_monitor(build_network(), tmp_path / "trace.jsonl"), 0)
    assert list(tmp_path.iterdir()) == []
