"""Workers on a real Ray cluster of this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from scripted_tasks import count_attempts, scripted_task

import dvar
from dvar.cluster.places import Places
from dvar.cluster.pool import Pool, interrupting_signals
from dvar.cluster.task import TaskEvent
from dvar.errors import RefusedInput

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_ray")]
HERE = Path(__file__).parent


@contextmanager
def cluster_of(*cpus: int) -> Iterator[Any]:
    """Start a cluster with a node for each number of CPUs; the first one is the head, which is never lost."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], "include_dashboard": False})
    cluster.lost_nodes = [cluster.add_node(num_cpus=count) for count in cpus[1:]]
    try:
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


def list_kinds(events: list[TaskEvent], name: str) -> list[str]:
    return [event.kind for event in events if event.task == name]


def test_tasks_run_on_a_cluster_that_is_started_here(tmp_path: Path) -> None:
    import ray

    places = Places(2, ray="auto")
    try:
        assert places.problems(tmp_path / "shared") == []
        with Pool(places.start(9), retries=1, preemptions=5) as pool:
            for name in "abc":
                pool.submit(scripted_task(tmp_path, name, [("print", name), ("report", 1)]))
            pool.submit(scripted_task(tmp_path, "torn", [("refuse", "no image")]))
            pool.submit(scripted_task(tmp_path, "killed", [("kill", 9)], [("report", 2)]))
            events = [event for event in pool.events() if event]
    finally:
        ray.shutdown()
    assert [list_kinds(events, name) for name in "abc"] == [["started", "progress", "done"]] * 3
    assert list_kinds(events, "torn") == ["started", "failed"]
    assert list_kinds(events, "killed") == ["started", "retried", "started", "progress", "done"]
    assert {event.worker for event in events} <= {"ray-1", "ray-2"}
    assert len({event.facts["pid"] for event in events if event.kind == "done"}) <= 3
    assert (tmp_path / "logs" / "a.log").read_text() == "a\n"


def test_a_worker_or_a_node_that_is_lost_is_a_preemption(tmp_path: Path) -> None:
    with cluster_of(1, 1) as cluster:
        places = Places(2, ray=cluster.address)
        assert places.problems(tmp_path) == []
        marks = [tmp_path / name for name in "ab"]
        lost: list[str] = []
        with Pool(places.start(9), preemptions=5) as pool:
            for mark in marks:
                pool.submit(scripted_task(tmp_path, mark.name, [("wait", str(mark))], [("report", 1)]))
            events = []
            for event in pool.events(every=0.2):
                events += [event] if event else []
                if not lost and all(mark.exists() for mark in marks):
                    lost.append("the node")
                    cluster.remove_node(cluster.lost_nodes[0], allow_graceful=False)
                elif len(lost) == 1 and any(event.kind == "preempted" for event in events):
                    lost.append("the other worker")
                    parent_of_scripted = [mark for mark in marks if not mark.with_suffix(".saved").exists()]
                    for mark in parent_of_scripted:
                        kill_supervisor(int(mark.read_text()))
        for name in "ab":
            assert list_kinds(events, name)[-1] == "done"
            assert list_kinds(events, name).count("preempted") >= 1
            assert "failed" not in list_kinds(events, name)
            assert count_attempts(tmp_path, name) == 2
        reasons = [str(event.facts["reason"]) for event in events if event.kind == "preempted"]
        assert all("the worker was lost" in reason for reason in reasons)


def kill_supervisor(process: int) -> None:
    """Kill the actor that started a process, if it is there; an orphan's new parent may be this test."""
    try:
        parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        is_actor = Path(f"/proc/{parent}/cmdline").read_text().startswith("ray::")
    except OSError:
        return
    if is_actor:
        os.kill(parent, signal.SIGKILL)


def test_an_interruption_reaches_the_process_of_a_node(tmp_path: Path) -> None:
    with cluster_of(1) as cluster:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a cluster within the test's process would exit
        places = Places(1, ray=cluster.address)
        assert places.problems() == []
        with pytest.raises(KeyboardInterrupt):
            interrupt_when_under_way(places, tmp_path)
    assert (tmp_path / "mark.saved").exists()


def interrupt_when_under_way(places: Places, folder: Path) -> None:
    with interrupting_signals(), Pool(places.start(9)) as pool:
        pool.submit(scripted_task(folder, "task", [("wait", str(folder / "mark"))]))
        for event in pool.events(every=0.2):
            if event is None and (folder / "mark").exists():
                os.kill(os.getpid(), signal.SIGTERM)


def test_nodes_of_another_version_or_that_do_not_see_the_folder_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dvar.cluster import ray_workers

    list_nodes = ray_workers._list_nodes

    def hide_files() -> Any:
        for path in tmp_path.glob(".*.seen"):
            path.unlink()
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        return list_nodes()

    with cluster_of(1) as cluster:
        assert Places(ray=cluster.address).problems(tmp_path) == []
        monkeypatch.setattr(ray_workers, "__version__", "9.9")
        monkeypatch.setattr(ray_workers, "_list_nodes", hide_files)
        hidden = [tmp_path / f"images-{number}" for number in range(5)]
        version, sight, others = Places(ray=cluster.address).problems(tmp_path, [tmp_path, *hidden])
    assert f"has dvar {dvar.__version__}, not 9.9: install the same" in version
    assert f"does not see {tmp_path}: name a shared folder or a URL" in sight
    assert "see what the tasks read and write" in others
    assert f"does not see {hidden[0]}, {hidden[1]}, {hidden[2]} and 2 more: put it on a disk" in others


CONNECT = """
import sys
from dvar.cluster.ray_connection import connect
from dvar.errors import RefusedInput
try:
    connect(sys.argv[1], 1, 1)
    print("connected")
except RefusedInput as refused:
    print(refused)
"""


@contextmanager
def ray_head(port: int, environment: dict[str, str]) -> Iterator[None]:
    """Start the head of a cluster by the command line of Ray, and end its processes and no others."""
    import psutil

    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}"]
    command += ["--num-cpus=1", "--include-dashboard=false", "--node-ip-address=127.0.0.1"]
    head = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert head.stdout
    try:
        assert any("Ray runtime started" in line for line in head.stdout)
        yield
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.communicate()


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_cluster_with_and_without_token_authentication(mode: str, tmp_path: Path) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": "a" * 64}
    environment.pop("RAY_ADDRESS", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ray_head(port, environment):
        answers = [
            subprocess.run(
                [sys.executable, "-c", CONNECT, f"127.0.0.1:{port}"],
                env={**environment, "RAY_AUTH_TOKEN": token},
                capture_output=True,
                text=True,
                timeout=180,
            ).stdout.strip()
            for token in ("a" * 64, "b" * 64)
        ]
    assert answers[0] == "connected"
    if mode == "token":
        assert "ray must be 'auto' or the address of a running cluster" in answers[1]
    else:
        assert answers[1] == "connected"


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("nonsense", "invalid literal"),
        ("ray://here:10001", "submit the command with `ray job submit"),
    ],
)
def test_an_address_that_cannot_be_joined_is_refused_at_once(address: str, problem: str) -> None:
    from dvar.cluster.ray_connection import connect

    with pytest.raises(RefusedInput, match=problem):
        connect(address, 1, 1)


def test_a_second_use_in_one_process_has_a_cluster_of_its_own_size(tmp_path: Path) -> None:
    import ray

    for workers in (1, 2):
        places = Places(workers, ray="auto")
        assert places.problems() == []
        with places.connected():
            assert ray.cluster_resources()["CPU"] == workers
            with pytest.raises(
                RefusedInput, match=r"is connected to, .*, got 127\.0\.0\.1:1: end what runs there and call"
            ):
                Places(ray="127.0.0.1:1").connected().__enter__()
            assert Places(ray=ray.get_runtime_context().gcs_address).problems() == []
            places.disconnect()
            assert ray.is_initialized(), "a pool uses it"
        assert not ray.is_initialized()


def test_a_connection_of_somebody_else_is_used_and_left(tmp_path: Path) -> None:
    import ray

    with cluster_of(1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        with Places(1, ray="auto").connected(), Places(1, ray=cluster.address).connected():
            pass
        assert ray.is_initialized()


def test_a_cluster_that_died_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from dvar.cluster.ray_connection import connect

    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    note = tmp_path / "ray" / "ray_current_cluster"
    note.parent.mkdir()
    note.write_text("127.0.0.1:1")
    connect("auto", 2, 3)
    assert [(call["address"], call.get("num_cpus")) for call in calls] == [("local", 6)]
    with socket.socket() as living:
        living.bind(("127.0.0.1", 0))
        living.listen()
        note.write_text(f"127.0.0.1:{living.getsockname()[1]}\n")
        connect("auto", 2, 3)
    note.unlink()
    connect("auto", 2, 3)
    assert [call["address"] for call in calls[1:]] == ["auto", "auto"]


def test_ray_is_not_imported_without_it() -> None:
    program = "import sys, dvar.cluster.places, dvar.jobs.batch, dvar.jobs.train_job; print('ray' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "False"
