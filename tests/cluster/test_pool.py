"""A pool of real processes: ends, failures, losses, interruptions."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_tasks import count_attempts, scripted_task

from dvar.cluster.local import LocalWorker
from dvar.cluster.pool import Pool, interrupting_signals
from dvar.cluster.task import Report, TaskEvent, WorkerTask

HERE = Path(__file__).parent


def run_tasks(tasks: list[WorkerTask], workers: int = 1, retries: int = 0, preemptions: int = 0) -> list[TaskEvent]:
    """Return all events of tasks."""
    pool = Pool(
        [LocalWorker(f"worker-{number}") for number in range(workers)], retries=retries, preemptions=preemptions
    )
    with pool:
        for task in tasks:
            pool.submit(task)
        return [event for event in pool.events() if event]


def list_kinds(events: list[TaskEvent], name: str) -> list[str]:
    return [event.kind for event in events if event.task == name]


def test_one_process_runs_all_tasks_of_a_worker_each_with_a_log(tmp_path: Path) -> None:
    tasks = [scripted_task(tmp_path, name, [("print", f"this is {name}"), ("report", 3)]) for name in "abc"]
    events = run_tasks(tasks)
    assert [list_kinds(events, name) for name in "abc"] == [["started", "progress", "done"]] * 3
    assert len({event.facts["pid"] for event in events if event.kind == "done"}) == 1
    assert [task.log.read_text() for task in tasks] == [f"this is {name}\n" for name in "abc"]


def test_another_number_of_threads_needs_another_process(tmp_path: Path) -> None:
    events = run_tasks([scripted_task(tmp_path, str(threads), threads=threads) for threads in (1, 2)])
    assert len({event.facts["pid"] for event in events if event.kind == "done"}) == 2


def test_several_workers_run_at_once(tmp_path: Path) -> None:
    marks = [tmp_path / name for name in "ab"]
    pool = Pool([LocalWorker("first"), LocalWorker("second")])
    with pool:
        for mark in marks:
            pool.submit(scripted_task(tmp_path, mark.name, [("wait", str(mark))]))
        for event in pool.events(every=0.05):
            if event is None and all(mark.exists() for mark in marks):
                assert sorted(pool.running) == ["a", "b"]
                pool.cancel()


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ([("fail", "the disk\nis full")], "the disk is full"),
        ([("crash", "oh no")], "ZeroDivisionError: oh no"),
        ([("kill", 9)], "killed by SIGKILL"),
        ([("kill", 40)], "killed by signal 40"),
        ([("print", "a note\ndvar: the loss was not finite"), ("exit", 3)], "the loss was not finite"),
        ([("exit", 3)], "ended with status 3 and said nothing"),
    ],
)
def test_a_failure_has_its_reason_is_tried_again_and_leaves_the_others_alone(
    tmp_path: Path, turn: list[tuple[str, object]], reason: str
) -> None:
    tasks = [scripted_task(tmp_path, "bad", turn), scripted_task(tmp_path, "good")]
    events = run_tasks(tasks, retries=2)
    assert list_kinds(events, "bad") == [*["started", "retried"] * 2, "started", "failed"]
    assert {event.facts["reason"] for event in events if event.kind in ("retried", "failed")} == {reason}
    assert count_attempts(tmp_path, "bad") == 3
    assert list_kinds(events, "good") == ["started", "done"]


def test_the_log_of_a_crash_has_its_place(tmp_path: Path) -> None:
    task = scripted_task(tmp_path, "bad", [("crash", "oh no")])
    run_tasks([task])
    assert "scripted.py" in task.log.read_text()


def test_what_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    events = run_tasks([scripted_task(tmp_path, "bad", [("refuse", "no images")])], retries=5)
    assert list_kinds(events, "bad") == ["started", "failed"]
    assert events[-1].facts == {"reason": "no images"}


def test_a_task_that_gets_further_is_never_given_up(tmp_path: Path) -> None:
    turns = [[("report", step), ("report", step + 9), ("kill", 9)] for step in (0, 10, 20, 30)]
    events = run_tasks([scripted_task(tmp_path, "long", *turns, [("report", 40)])], retries=1)
    assert list_kinds(events, "long")[-1] == "done"
    assert count_attempts(tmp_path, "long") == 5
    stuck = [[("report", 10), ("report", 19), ("kill", 9)]]
    events = run_tasks([scripted_task(tmp_path, "stuck", *stuck)], retries=1)
    assert list_kinds(events, "stuck")[-1] == "failed"
    assert count_attempts(tmp_path, "stuck") == 2


def test_a_worker_that_is_asked_to_stop_by_others_is_a_preemption_and_no_failure(tmp_path: Path) -> None:
    events = run_tasks([scripted_task(tmp_path, "moved", [("kill", 15)], [])], preemptions=1)
    assert list_kinds(events, "moved") == ["started", "preempted", "started", "done"]
    events = run_tasks([scripted_task(tmp_path, "hopeless", [("kill", 15)])], preemptions=1)
    assert list_kinds(events, "hopeless") == ["started", "preempted", "started", "interrupted"]


def test_a_worker_that_dies_between_two_tasks_costs_none(tmp_path: Path) -> None:
    worker = LocalWorker("worker")
    pid = list(worker.run(scripted_task(tmp_path, "first")))[-1]["pid"]
    os.kill(pid, signal.SIGKILL)
    assert worker._process
    worker._process.wait()
    assert list(worker.run(scripted_task(tmp_path, "second")))[-1]["report"] == "done"
    worker.close()


class Unplaced(LocalWorker):
    """A worker whose cluster has no room for it and answers slowly."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.asked, self.closed = threading.Event(), threading.Event()

    def ready(self, seconds: float) -> bool:
        self.asked.set()
        self.closed.wait()
        threading.Event().wait(0.2)
        return False

    def close(self) -> None:
        self.closed.set()


def test_no_thread_asks_a_cluster_after_the_end_of_the_pool(tmp_path: Path) -> None:
    before, unplaced = {*threading.enumerate()}, Unplaced("unplaced")
    with Pool([LocalWorker("placed"), unplaced]) as pool:
        pool.submit(scripted_task(tmp_path, "task"))
        assert [event.kind for event in pool.events() if event] == ["started", "done"]
        assert unplaced.asked.wait(10)
    assert {*threading.enumerate()} <= before


class Broken(LocalWorker):
    """A worker whose cluster is gone.

    Args:
        name: Its name.
        when: When it notices: "ready", or "run" for once it has a task.
    """

    def __init__(self, name: str, when: str) -> None:
        super().__init__(name)
        self.when = when

    def ready(self, seconds: float) -> bool:
        if self.when == "ready":
            raise ConnectionError("no head")
        return True

    def run(self, task: WorkerTask) -> Iterator[Report]:
        raise ConnectionError("no head")


@pytest.mark.parametrize("when", ["ready", "run"])
def test_a_task_whose_worker_breaks_ends_with_what_broke_it(tmp_path: Path, when: str) -> None:
    with Pool([Broken("first", when), Broken("second", when)], retries=1) as pool:
        for name in "ab":
            pool.submit(scripted_task(tmp_path, name))
        events = [event for event in pool.events() if event]
    for name in "ab":
        assert list_kinds(events, name) == ["started", "retried", "started", "failed"]
    assert events[-1].facts == {"reason": "the worker broke (ConnectionError: no head)"}


def test_a_broken_worker_leaves_the_tasks_to_the_others(tmp_path: Path) -> None:
    with Pool([Broken("broken", "ready"), LocalWorker("sound")]) as pool:
        for name in "ab":
            pool.submit(scripted_task(tmp_path, name))
        events = [event for event in pool.events() if event]
    assert {event.worker for event in events} == {"sound"}
    assert [list_kinds(events, name) for name in "ab"] == [["started", "done"]] * 2


@pytest.mark.parametrize("where", ["events", "consumer"])
def test_an_interruption_asks_the_running_task_to_save_and_starts_no_more(tmp_path: Path, where: str) -> None:
    kinds: list[tuple[str, str]] = []
    with pytest.raises(KeyboardInterrupt):
        interrupt_pool(tmp_path, kinds, where)
    assert (tmp_path / "a.saved").exists()
    assert not (tmp_path / "b").exists()
    seen = [("a", "started"), ("a", "interrupted"), ("b", "interrupted")]
    assert kinds == (seen if where == "events" else seen[:1])


def interrupt_pool(folder: Path, kinds: list[tuple[str, str]], where: str) -> None:
    """Run two tasks, and interrupt once the first is under way: while events are waited for, or while one is used."""
    timers: list[threading.Timer] = []
    pool = Pool([LocalWorker("worker")])
    with interrupting_signals(), pool:
        for name in "ab":
            pool.submit(scripted_task(folder, name, [("wait", str(folder / name))]))
        for event in pool.events(every=0.05):
            if event:
                kinds.append((event.task, event.kind))
            elif (folder / "a").exists() and where == "consumer":
                raise KeyboardInterrupt
            elif (folder / "a").exists() and not timers:
                timers.append(threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)))
                timers[0].start()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_would_end_the_driver_interrupt_it(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), interrupting_signals():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with interrupting_signals():
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


DRIVER = """
import sys
import threading
from pathlib import Path
from scripted_tasks import scripted_task
from dvar.cluster.local import LocalWorker
from dvar.cluster.pool import Pool
folder = Path(sys.argv[1])
with Pool([LocalWorker("worker")]) as pool:
    pool.submit(scripted_task(folder, "task", [("wait", str(folder / "mark"))]))
    for event in pool.events(every=0.05):
        if (folder / "mark").exists():
            print("running", flush=True)
"""


def test_a_worker_whose_driver_is_killed_saves_and_ends(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    assert driver.stdout.readline() == "running\n"
    driver.kill()
    driver.communicate()
    worker = int((tmp_path / "mark").read_text())
    while is_alive(worker):
        pass
    assert (tmp_path / "mark.saved").exists()


def test_two_hundred_tasks_are_done_once_each_under_twenty_kills(tmp_path: Path) -> None:
    numbers = random.Random(0)
    names = [f"task-{number}" for number in range(200)]
    workers = [LocalWorker("first"), LocalWorker("second")]
    kills = 0
    pool = Pool(workers, retries=2)
    with pool:
        for name in names:
            pool.submit(scripted_task(tmp_path, name))
        events = []
        for event in pool.events():
            assert event
            events.append(event)
            process = numbers.choice(workers)._process
            if kills < 20 and numbers.random() < 0.1 and process and process.poll() is None:
                process.kill()
                kills += 1
    assert kills == 20
    assert sorted(event.task for event in events if event.kind == "done") == sorted(names)
    # One that was killed after its last word and before its next task is begun no more often.
    repeated = sum(count_attempts(tmp_path, name) - 1 for name in names)
    assert repeated <= sum(event.kind == "retried" for event in events) <= 20


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
