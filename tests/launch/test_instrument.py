"""The additions to a training loop."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dvar.launch.instrument import NAME, compile_instrumented

LOOP = """from __future__ import annotations
def train():
    global_step = 5
    for epoch in range(3):
        for step, batch in enumerate(batches, 1):
            log.append(("before", epoch, step, batch))
            accelerator.backward(batch / 2)
            log.append(("after", step))
            global_step += 1
        log.append(("epoch", epoch))
    log.append(("end",))
"""


class ScriptedSession:
    """A session that gives a script one held batch before its own, and stops it where a test wants."""

    def __init__(self, stop_after: int = 99) -> None:
        self.measuring, self.taken, self.counts, self.stop_after = False, list[Any](), 0, stop_after
        self.read: list[Any] = []
        self.given = 0

    def batches(self, key: str, counted: bool, iterable: tuple[Any, ...], *values: Any) -> Iterator[Any]:
        assert counted
        self.read.append((key, values[0]()))
        self.measuring = True
        yield 0, 100
        self.measuring = False
        self.given = 0
        for index, batch in enumerate(*iterable):
            if self.stopped(key):
                return
            self.given += 1
            yield index, batch

    def take(self, loss: Any) -> None:
        self.taken.append(loss)

    def count(self) -> None:
        self.counts += 1

    def absorb(self) -> bool:
        return self.measuring

    def stopped(self, key: str) -> bool:
        return self.counts >= self.stop_after

    def idle(self, key: str) -> bool:
        return not self.given and self.stopped(key)


def run(session: ScriptedSession, source: str = LOOP, **names: Any) -> list[Any]:
    """Run an instrumented source and return what it logged."""
    code, _ = compile_instrumented(source.encode(), Path("train.py"))
    log: list[Any] = []
    accelerator = SimpleNamespace(backward=lambda loss: log.append(("backward", loss)))
    space: dict[str, Any] = {NAME: session, "log": log, "accelerator": accelerator, "batches": [10, 20], **names}
    exec(code, space)
    space["train"]()
    return log


def test_a_held_batch_reaches_the_loss_and_nothing_after_it() -> None:
    session = ScriptedSession()
    log = run(session)
    assert session.taken == [50.0] * 3
    assert [entry for entry in log if 100 in entry] == [("before", epoch, 0, 100) for epoch in range(3)]
    assert [entry for entry in log if entry[0] in ("backward", "after")][:4] == [
        ("backward", 5.0),
        ("after", 1),
        ("backward", 10.0),
        ("after", 2),
    ]
    assert session.counts == 6
    assert session.read == [("train.py:5", 5), ("train.py:5", 7), ("train.py:5", 9)]


def test_a_stop_ends_the_epoch_and_no_further_one_begins() -> None:
    log = run(ScriptedSession(stop_after=3))
    assert log[-3:] == [("after", 1), ("epoch", 1), ("end",)]


def test_a_stop_leaves_where_the_script_itself_would() -> None:
    source = LOOP.replace(
        '        log.append(("epoch", epoch))\n',
        '        log.append(("mean", epoch))\n'
        "        if global_step >= 50:\n            break\n"
        '        log.append(("validation", epoch))\n',
    )
    log = run(ScriptedSession(stop_after=3), source)
    assert log[-2:] == [("mean", 1), ("end",)]
    assert ("validation", 0) in log


def test_a_stop_before_the_first_batch_of_an_epoch_leaves_at_once() -> None:
    assert run(ScriptedSession(stop_after=0)) == [("before", 0, 0, 100), ("end",)]


def test_a_stop_in_an_epoch_that_ends_early_leaves_before_the_end_of_the_next() -> None:
    source = LOOP.replace('        log.append(("epoch"', '        if epoch == 0: continue\n        log.append(("epoch"')
    log = run(ScriptedSession(stop_after=1), source)
    assert log[-2:] == [("before", 1, 0, 100), ("end",)]


def test_a_stop_leaves_all_loops_around() -> None:
    source = (
        "def train():\n    for part in range(2):\n        for epoch in range(2):\n            if True:\n"
        "                for step, batch in enumerate(batches):\n                    accelerator.backward(batch)\n"
        '            log.append(("epoch", epoch))\n        log.append(("part", part))\n'
    )
    log = run(ScriptedSession(stop_after=3), source)
    assert [entry for entry in log if entry[0] != "backward"] == [("epoch", 0), ("epoch", 1), ("part", 0)]


def test_an_error_on_a_held_batch_is_absorbed_and_any_other_is_not() -> None:
    def fail_on(value: float) -> Any:
        def backward(loss: float) -> None:
            if loss == value:
                raise ValueError("broken")

        return SimpleNamespace(backward=backward)

    source = LOOP.replace("accelerator.backward(batch / 2)", "accelerator.backward(batch / (batch - 100))")
    session = ScriptedSession()
    run(session, source, accelerator=fail_on(0))
    assert (session.taken, session.counts) == ([], 6)
    with pytest.raises(ValueError, match="broken") as caught:
        run(ScriptedSession(), LOOP, accelerator=fail_on(10.0))
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(caught.tb)]
    assert ("train.py", 7) in frames


def test_a_module_without_a_training_loop_is_left_as_it_is() -> None:
    source = "def train():\n    for batch in batches:\n        log.append(batch)\n"
    assert compile_instrumented(source.encode(), Path("train.py"))[1] == []
    assert run(ScriptedSession(), source) == [10, 20]
