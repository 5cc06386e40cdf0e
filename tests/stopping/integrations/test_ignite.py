"""The handler on a real Engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
from ignite.engine import Engine, Events
from task import CAP, RATE, STOP, X, assert_as_expected, build_loss, build_monitor, build_network, record_expected_trace

from dvar import Trace
from dvar.stopping.integrations.ignite import DvarHandler


def run_engine(path: Path, *, last: int = CAP, parts: int = 1, resume: dict[str, Any] | None = None) -> Any:
    """Return an engine that trained for `last` updates of `parts` batches each, and the content of its checkpoint."""
    net = build_network()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)

    def update(engine: Engine, batch: int) -> None:
        assert net.training
        (build_loss(net)(X).mean() / parts).backward()  # type: ignore[no-untyped-call]
        if engine.state.iteration % parts == 0:
            optimizer.step()
            optimizer.zero_grad()

    engine = Engine(update)
    if resume is not None:
        engine.load_state_dict(resume["engine"]), net.load_state_dict(resume["net"])
    handler = DvarHandler(build_monitor(net, path), updates=lambda engine: engine.state.iteration // parts)
    handler.attach(engine)
    saved: dict[str, Any] = {}

    def save(engine: Engine) -> None:
        saved.update(engine=dict(engine.state_dict()), net={k: v.clone() for k, v in net.state_dict().items()})

    def kill(engine: Engine) -> None:
        if engine.state.iteration >= last * parts:
            engine.terminate()

    engine.add_event_handler(Events.ITERATION_COMPLETED(once=10 * parts), save)
    engine.add_event_handler(Events.ITERATION_COMPLETED, kill)
    engine.run(range(8), max_epochs=200)
    return engine, handler, saved


@pytest.mark.parametrize("parts", [1, 2])
def test_it_terminates_the_engine_where_the_plain_loop_stops(tmp_path: Path, parts: int) -> None:
    engine, handler, _ = run_engine(tmp_path / "trace.jsonl", parts=parts)
    assert engine.state.iteration == record_expected_trace().last_step * parts
    assert handler.verdict == STOP(Trace.read(tmp_path / "trace.jsonl"))
    assert handler.verdict.stop
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_updates_are_iterations_by_default(tmp_path: Path) -> None:
    engine = Engine(lambda engine, batch: None)
    handler = DvarHandler(build_monitor(build_network(), tmp_path / "trace.jsonl"))
    handler.attach(engine)
    engine.run(range(3))
    assert Trace.read(tmp_path / "trace.jsonl").steps.tolist() == [0, 1, 2, 3]


def test_a_killed_run_resumed_from_its_checkpoint_stops_at_the_same_step(tmp_path: Path) -> None:
    *_, saved = run_engine(tmp_path / "trace.jsonl", last=13)
    engine, handler, _ = run_engine(tmp_path / "trace.jsonl", resume=saved)
    assert (engine.state.iteration, handler.verdict.stop) == (record_expected_trace().last_step, True)
    assert_as_expected(Trace.read(tmp_path / "trace.jsonl"))


def test_a_stopped_run_that_is_resumed_makes_no_further_update(tmp_path: Path) -> None:
    net = build_network()
    engine, _, _ = run_engine(tmp_path / "trace.jsonl")
    resumed, handler, _ = run_engine(
        tmp_path / "trace.jsonl", resume={"engine": engine.state_dict(), "net": net.state_dict()}
    )
    assert handler.verdict.stop
    assert resumed.state.iteration == engine.state.iteration


def test_ignite_can_broadcast_a_verdict() -> None:
    """What `idist.broadcast` takes in two processes: text, and anything on the ranks that hear."""
    from dvar.stopping.integrations.ignite import _broadcast

    assert idist.get_world_size() == 1
    assert _broadcast({"stop": True, "metrics": {"ratio": 0.1}}) == {"stop": True, "metrics": {"ratio": 0.1}}
