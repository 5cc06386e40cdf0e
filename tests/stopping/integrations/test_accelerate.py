"""Two real processes under accelerate: one judges, both stop at the same step, and a failure of one is one of both."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType
from processes import said_by_two
from task import CAP, STOP, assert_as_expected, expected, network, watch_of

from dvar import RefusedInput, Trace, Verdict
from dvar.stopping.integrations.accelerate import judged_together

WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from dvar import DvarError
from dvar.stopping.integrations.accelerate import judged_together
from task import CAP, RATE, X, losses_of, network, watch_of

folder = Path(sys.argv[1])
accelerator = Accelerator(
    cpu=True, gradient_accumulation_steps=2, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))]
)
net = network()
model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=RATE))
watch = watch_of(accelerator.unwrap_model(model), folder / "trace.jsonl")
step, verdict = 0, judged_together(accelerator, watch, 0)
while not verdict.stop and step < CAP:
    with accelerator.accumulate(model):
        accelerator.backward(losses_of(model)(X).mean())
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        step += 1
        verdict = judged_together(accelerator, watch, step)
said = {"kind": type(model).__name__, "step": step, "verdict": verdict.to_json(), "records": len(watch.trace)}

faulty = watch_of(accelerator.unwrap_model(model), folder / "faulty.jsonl")
faulty.probe = lambda: 1 / 0
try:
    judged_together(accelerator, faulty, 0)
except (ZeroDivisionError, DvarError) as error:
    said |= {"error": type(error).__name__, "told": str(error)}
(folder / f"said-{accelerator.process_index}.json").write_text(json.dumps(said))
accelerator.end_training()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, Any]]:
    return said_by_two(WORKER, folder)


def test_two_processes_stop_at_the_same_step_by_the_verdict_of_the_first(
    folder: Path, said: list[dict[str, Any]]
) -> None:
    first, other = said
    assert first["kind"] == other["kind"] == "DistributedDataParallel"
    assert first["step"] == other["step"] == expected().last_step < CAP
    assert Verdict.from_json(first["verdict"]) == Verdict.from_json(other["verdict"])
    assert first["verdict"] == other["verdict"]
    assert (first["records"], other["records"]) == (len(expected()), 0)  # the second one neither measures nor writes
    assert_as_expected(Trace.read(folder / "trace.jsonl"))


def test_a_failure_of_the_first_process_is_one_of_the_other_too(said: list[dict[str, Any]]) -> None:
    first, other = said
    told = "division by zero"
    assert (first["error"], first["told"]) == ("ZeroDivisionError", told)
    assert (other["error"], other["told"]) == (
        "DvarError",
        f"the first rank could not judge: ZeroDivisionError: {told}",
    )


def test_one_process_needs_no_other(tmp_path: Path) -> None:
    accelerator, net = Accelerator(cpu=True), network()
    watch = watch_of(net, tmp_path / "trace.jsonl")
    assert judged_together(accelerator, watch, 0) == STOP(watch.trace)
    assert len(watch.trace) == 1


@pytest.mark.parametrize(("kind", "stage"), [("FSDP", 0), ("MEGATRON_LM", 0), ("DEEPSPEED", 3)])
def test_a_model_in_parts_is_refused(tmp_path: Path, kind: str, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setitem(accelerator.state._shared_state, "distributed_type", DistributedType(kind))
    plugins = {"only": SimpleNamespace(zero_stage=stage, selected=True)}
    monkeypatch.setitem(accelerator.state._shared_state, "deepspeed_plugins", plugins)
    with pytest.raises(RefusedInput, match=f"needs the whole model there, got {kind}: measure the loss on all proc"):
        judged_together(accelerator, watch_of(network(), tmp_path / "trace.jsonl"), 0)
    assert list(tmp_path.iterdir()) == []
