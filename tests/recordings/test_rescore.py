"""Scoring recorded runs again on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fake_record import write_fake_record

from dvar.cluster.places import Places
from dvar.cluster.task import Report, WorkerTask
from dvar.recordings import rescore
from dvar.recordings.archive import RecordingArchive


class LosesFirstNode:
    """A worker whose node is lost in its first task."""

    name = "ray-1"

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def ready(self, seconds: float) -> bool:
        return True

    def run(self, task: WorkerTask) -> Iterator[Report]:
        self.tasks.append(task.name)
        yield {"report": "interrupted" if len(self.tasks) == 1 else "done"}

    def cancel(self) -> None: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...


def test_a_run_whose_node_is_lost_is_rescored_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, calls, lines = LosesFirstNode(), list[Any](), list[str]()
    folder = write_fake_record(tmp_path, cap=100, every=10)
    monkeypatch.setattr(rescore, "_can_restore", lambda run: True)
    monkeypatch.setattr(Places, "count", 1)
    monkeypatch.setattr(Places, "problems", lambda places, *arguments: calls.append(arguments) or [])  # type: ignore[func-returns-value]
    monkeypatch.setattr(Places, "connected", lambda places: nullcontext())
    monkeypatch.setattr(Places, "start", lambda places, most: [worker])
    archive = RecordingArchive.open(tmp_path)
    rescore.rescore_archive(archive, {run: {0} for run in archive}, lines.append, ray="auto")
    assert worker.tasks == [str(folder)] * 2
    assert lines[-1] == "textual-inversion/red_mug/0 rescored, 0 runs left"
    assert calls == [(folder, [folder])], "a node that does not see the runs is not refused"
