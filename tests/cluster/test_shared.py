"""Workers that share a process: tasks side by side, ends, failures, losses, interruptions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_tasks import Turn, count_attempts, scripted_task

from dvar.cluster.places import Places
from dvar.cluster.pool import Pool
from dvar.cluster.shared import start_places
from dvar.cluster.task import TaskEvent, WorkerTask


def team_task(folder: Path, name: str, *turns: Turn) -> WorkerTask:
    return replace(scripted_task(folder, name, *turns), program="scripted_team")


def run_tasks(tasks: list[WorkerTask], places: int = 2, **limits: int) -> list[TaskEvent]:
    with Pool(start_places("worker", places), **limits) as pool:
        for task in tasks:
            pool.submit(task)
        return [event for event in pool.events() if event]


def list_kinds(events: list[TaskEvent], name: str) -> list[str]:
    return [event.kind for event in events if event.task == name]


def facts_of(events: list[TaskEvent], name: str) -> dict[str, Any]:
    return next(dict(event.facts) for event in events if event.task == name and event.kind in ("done", "failed"))


def test_tasks_run_side_by_side_in_one_process_and_a_free_place_is_given_on(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    turns: dict[str, Turn] = {
        "a": [("report", 1), ("meet", mark)],
        "b": [("print", "b was here")],
        "c": [("mark", mark)],
    }
    events = run_tasks([team_task(tmp_path, name, turn) for name, turn in turns.items()])
    assert [list_kinds(events, name)[-1] for name in "abc"] == ["done"] * 3  # "a" waits for "c", which waits for "b"
    assert list_kinds(events, "a") == ["started", "progress", "done"]
    assert len({facts_of(events, name)["pid"] for name in "abc"}) == 1
    assert {event.worker for event in events} == {"worker.1", "worker.2"}
    assert (tmp_path / "logs" / "worker.log").read_text() == "b was here\n"


@pytest.mark.parametrize(
    ("turn", "reason", "attempts"),
    [
        ([("fail", "the disk\nis full")], "the disk is full", 2),
        ([("crash", "oh no")], "ZeroDivisionError: oh no", 2),
        ([("refuse", "no images")], "no images", 1),
    ],
)
def test_a_failure_is_of_one_task_alone(tmp_path: Path, turn: Turn, reason: str, attempts: int) -> None:
    done = str(tmp_path / "done")
    others = [team_task(tmp_path, "beside", [("meet", done)]), team_task(tmp_path, "after", [("mark", done)])]
    events = run_tasks([others[0], team_task(tmp_path, "bad", turn), others[1]], retries=1)
    assert list_kinds(events, "bad")[-1] == "failed"
    assert facts_of(events, "bad") == {"reason": reason}
    assert count_attempts(tmp_path, "bad") == attempts
    assert [list_kinds(events, name) for name in ("beside", "after")] == [["started", "done"]] * 2
    assert count_attempts(tmp_path, "beside") == 1


def test_a_process_that_dies_costs_each_of_its_tasks_an_attempt(tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    tasks = [
        team_task(tmp_path, "victim", [("wait", mark)], []),
        team_task(tmp_path, "bad", [("meet", mark), ("kill", 9)], []),
    ]
    events = run_tasks(tasks, retries=1)
    for name in ("victim", "bad"):
        assert list_kinds(events, name) == ["started", "retried", "started", "done"]
    assert {event.facts["reason"] for event in events if event.kind == "retried"} == {"killed by SIGKILL"}


def test_one_task_is_cancelled_and_the_other_goes_on(tmp_path: Path) -> None:
    waiting, gone = tmp_path / "waiting", tmp_path / "waiting.saved"
    with Pool(start_places("worker", 2)) as pool:
        pool.submit(team_task(tmp_path, "first", [("wait", str(waiting))]))
        pool.submit(team_task(tmp_path, "second", [("meet", str(gone))]))
        ends = {}
        for event in pool.events(every=0.05):
            if event is None and waiting.exists():
                pool.cancel("first")
            elif event:
                ends[event.task] = event.kind
    assert ends == {"first": "interrupted", "second": "done"}


def test_all_save_when_the_driver_is_lost(tmp_path: Path) -> None:
    marks = [tmp_path / name for name in "ab"]
    program = f"""
import sys
from pathlib import Path
from test_shared import team_task
from dvar.cluster.pool import Pool
from dvar.cluster.shared import start_places
with Pool(start_places("worker", 2)) as pool:
    for name in "ab":
        pool.submit(team_task(Path({str(tmp_path)!r}), name, [("wait", {str(tmp_path)!r} + "/" + name)]))
    for event in pool.events(every=0.05):
        if all((Path({str(tmp_path)!r}) / name).exists() for name in "ab"):
            print("under way", flush=True)
"""
    driver = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    driver.stdout.readline()
    pid = int((tmp_path / "a.attempts").read_text())
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    while is_alive(pid):
        pass
    assert all(mark.with_suffix(".saved").exists() for mark in marks)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_few_tasks_are_spread_over_all_workers() -> None:
    names = [worker.name for worker in Places(workers=2, pack=3).start(4)]
    assert names == ["worker-1.1", "worker-2.1", "worker-1.2", "worker-2.2"]
    assert [worker.name for worker in Places(workers=3).start(2)] == ["worker-1", "worker-2"]
