"""Batches on the tiny model: each worker is a real process."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from batch_tables import tiny_settings, tiny_table, write_toml
from command_line import dvar
from short_run import Outcome

import dvar as package
from dvar.cluster.places import Places
from dvar.cluster.pool import Pool
from dvar.errors import RefusedInput
from dvar.jobs.batch import Batch, JobEvent
from dvar.jobs.config import BatchConfig
from dvar.jobs.read_jobs import Table, read_jobs
from dvar.locks import lock_path
from dvar.training.personalise import personalise


def run_batch(source: Any, **settings: Any) -> tuple[list[JobEvent], dict[str, Any]]:
    """Return the events of a batch and its summary."""
    opened = Batch(source, BatchConfig(**settings))
    return [event for event in opened.events() if event], opened.summary()


def list_kinds(events: list[JobEvent], job: str) -> list[str]:
    return [event.kind for event in events if event.job == job and event.kind != "progress"]


def train_alone(table: Table, folder: Path) -> Outcome:
    """Return the outcome of a job that is trained without a batch, on one thread, as workers train by default."""
    (job,) = read_jobs([table], BatchConfig(output_dir=str(folder)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # others round otherwise
    try:
        return Outcome.of(personalise(replace(job.config, output_dir=str(folder / "alone"))).folder)
    finally:
        torch.set_num_threads(threads)


def test_a_batch_is_its_runs_and_its_second_start_does_only_what_is_missing(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    settings = tiny_settings(tiny_model, initializer_token="mug")
    tables = [{"id": name, "instance_data_dir": str(concepts / name)} for name in ("ball", "torn", "mug")]
    path, out = write_toml(tmp_path / "jobs.toml", settings, tables), tmp_path / "out"
    answer = dvar("batch", path, "--output_dir", out, "--workers", 1, "--json")
    assert answer.status == 1, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    ends = {row["job"]: row for row in rows if row["event"] in ("done", "failed")}
    assert [ends[name]["event"] for name in ("ball", "torn", "mug")] == ["done", "failed", "done"]
    assert "is not an image that can be read" in ends["torn"]["reason"]
    assert (ends["mug"]["steps"], ends["mug"]["verdict"]) == (9, "cap reached")
    assert "jobs      2 done, 1 failed of 3" in answer.err
    logged = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert logged == [row for row in rows if row["event"] != "progress"]
    assert json.loads((out / "summary.json").read_text())["verdicts"] == {"cap reached": 2}
    for name in ("ball", "mug"):  # the second one on a base model that the first one has used
        assert Outcome.of(out / name) == train_alone(tiny_table(tiny_model, concepts, name), tmp_path / f"{name}-alone")
        assert not list((out / name).glob("checkpoint-*"))

    answer = dvar("batch", path, "--output_dir", out, "--workers", 1)
    assert "3 jobs, 1 of them to train" in answer.err
    assert "torn: failed" in answer.err
    assert "mug: started" not in answer.err
    path.write_text(path.read_text().replace("max_train_steps = 9", "max_train_steps = 10"))
    answer = dvar("batch", path, "--output_dir", out, "--workers", 1)
    assert answer.status == 2
    assert "ball has other settings or images than the run in" in answer.err
    assert "mug has other settings or images" in answer.err


def test_a_batch_as_a_function_yields_events_and_refuses_before_the_first(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = tiny_table(tiny_model, concepts, "mug")
    with pytest.raises(RefusedInput, match="unknown setting 'worker'"):
        package.batch([table], worker=1)
    with pytest.raises(RefusedInput) as refused:
        package.batch([{**table, "sede": 1}], output_dir=str(concepts / "ball.json"))
    assert len(refused.value.problems) == 2
    events = list(package.batch([table], output_dir=str(tmp_path), workers=1, checkpoints="last"))
    assert [event.kind for event in events if event.kind != "progress"] == ["started", "done"]
    assert events[1].facts.items() >= {"step": 0, "cap": 9}.items()
    assert [path.name for path in (tmp_path / "mug").glob("checkpoint-*")] == ["checkpoint-9"]
    assert list(package.batch([table], output_dir=str(tmp_path))) == []


def test_a_conflict_of_one_job_is_named_beside_a_fault_of_another(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    tables = [tiny_table(tiny_model, concepts, name) for name in ("ball", "mug")]
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "config.json").write_text("{}")
    with pytest.raises(RefusedInput) as refused:
        Batch([{**tables[0], "seed": -1}, tables[1]], BatchConfig(output_dir=str(tmp_path)))
    fault, conflict = refused.value.problems
    assert "job ball: seed must be at least 0" in fault
    assert "holds a run that no batch has started" in conflict


def test_the_nodes_of_a_cluster_must_see_what_the_jobs_read_and_write(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(Places, "problems", lambda places, *arguments: calls.append(arguments) or [])  # type: ignore[func-returns-value]
    (tmp_path / "own").mkdir()
    (tmp_path / "prompts.txt").write_text("a {}\n")
    listed = [{"instance_data_dir": str(concepts / "ball"), "class_data_dir": str(concepts / "torn")}]
    (tmp_path / "list.json").write_text(json.dumps(listed))
    tables: list[Table] = [
        {**tiny_table(tiny_model, concepts, "mug"), "sample_prompts": str(tmp_path / "prompts.txt")},
        {
            **tiny_settings(tiny_model, output_dir=str(tmp_path / "own" / "run")),
            "id": "list",
            "method": "custom-diffusion",
            "validation_prompt": "a <new1>",
            "concepts_list": str(tmp_path / "list.json"),
        },
    ]
    (tmp_path / "out").mkdir()
    Batch(tables, BatchConfig(output_dir=str(tmp_path / "out"), ray="auto"))
    ((shared, paths),) = calls
    assert shared == tmp_path / "out"
    assert paths == {
        *(concepts / name for name in ("mug", "ball", "torn")),
        *(tmp_path / name for name in ("prompts.txt", "list.json", "own", "out")),
        tiny_model,
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_two_batches_on_ray_in_one_process(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    tables = [tiny_table(tiny_model, concepts, name) for name in ("ball", "mug")]
    for count in (1, 2):  # the second is on a cluster of two places
        events = list(package.batch(tables[:count], output_dir=str(tmp_path / str(count)), workers=count, ray="auto"))
        assert [event.kind for event in events].count("done") == count
        assert len({event.worker for event in events}) == count
        assert not ray.is_initialized()
    with pytest.raises(RefusedInput, match=r"got 127\.0\.0\.1:1 \("):
        package.batch(tables, output_dir=str(tmp_path / "3"), ray="127.0.0.1:1")


def test_the_run_of_another_is_not_touched(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    table = tiny_table(tiny_model, concepts, "mug")
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "config.json").write_text("{}")
    with pytest.raises(RefusedInput, match="holds a run that no batch has started"):
        Batch([table], BatchConfig(output_dir=str(tmp_path)))


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"digest": 3}', "{" * 9, "[" * 100_000, '"\\ud800"'])
@pytest.mark.parametrize("name", ["job.json", "result.json"])
def test_files_of_another_shape_are_no_run(
    name: str, text: str, tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = tiny_table(tiny_model, concepts, "mug")
    (job,) = read_jobs([table], BatchConfig(output_dir=str(tmp_path)))
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "job.json").write_text(json.dumps({"id": "mug", "digest": job.digest}))
    (tmp_path / "mug" / name).write_text(text)
    (status,) = Batch([table], BatchConfig(output_dir=str(tmp_path))).statuses
    assert status.state == "missing"


def test_two_commands_do_not_run_one_batch_at_once(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    jobs = write_toml(tmp_path / "jobs.toml", {}, [tiny_table(tiny_model, concepts, "mug")])
    folder = tmp_path / "runs"
    folder.mkdir()
    with lock_path(folder / ".batch.lock", folder):
        answer = dvar("batch", str(jobs), "--output_dir", str(folder))
    assert (answer.status, "is being written" in answer.err) == (2, True), answer
    assert not list(folder.iterdir()), "it wrote into the folder of the other one"


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """Let no process that is started in a scope write more than ``size`` bytes into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
def test_a_full_disk_fails_the_jobs_with_the_reason_and_the_next_start_does_them(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = tiny_table(tiny_model, concepts, "mug")
    with small_files(2500):  # more than the config, less than the first sample
        events, summary = run_batch([table], output_dir=str(tmp_path), workers=1, retries=1)
    assert list_kinds(events, "mug") == ["started", "retried", "started", "failed"]
    assert "cannot be written or read (File too large)" in summary["failures"]["mug"]
    events, summary = run_batch([table], output_dir=str(tmp_path), workers=1)
    assert summary["done"] == 1
    assert Outcome.of(tmp_path / "mug") == train_alone(table, tmp_path / "alone")


@pytest.mark.slow
def test_a_driver_that_is_killed_leaves_a_batch_that_goes_on(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    tables = [tiny_table(tiny_model, concepts, name, max_train_steps=40) for name in ("ball", "mug")]
    path, out = write_toml(tmp_path / "jobs.toml", {}, tables), str(tmp_path / "out")
    command = [sys.executable, "-m", "dvar", "batch", str(path), "--output_dir", out, "--workers", "2", "--json"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert driver.stdout
    for line in driver.stdout:
        if json.loads(line).get("step", 0) > 0:
            break
    driver.kill()
    driver.communicate()
    _, summary = run_batch(path, output_dir=out, workers=2)
    assert summary["done"] == 2
    for table in tables:
        assert Outcome.of(tmp_path / "out" / table["id"]) == train_alone(table, tmp_path / f"{table['id']}-alone")


@pytest.mark.slow
def test_two_hundred_jobs_under_twenty_kills_are_done_once_each_and_are_the_same_runs(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = [
        {**tiny_table(tiny_model, concepts, "mug", seed=seed, validation_steps=100), "id": f"job-{seed}"}
        for seed in range(200)
    ]
    pools: list[Pool] = []
    enter = Pool.__enter__
    monkeypatch.setattr(Pool, "__enter__", lambda pool: pools.append(pool) or enter(pool))  # type: ignore[func-returns-value]
    opened, numbers, kills, events = Batch(tables, BatchConfig(output_dir=str(tmp_path / "killed"))), Random(0), 0, []
    for event in opened.events():
        assert event
        events.append(event)
        process = getattr(numbers.choice(list(pools[0].workers)), "_process", None)
        if kills < 20 and event.kind == "progress" and numbers.random() < 0.2 and process and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
    assert kills == 20
    summary = opened.summary()
    assert summary["done"] == 200, summary["failures"]
    assert sorted(event.job for event in events if event.kind == "done") == sorted(table["id"] for table in tables)
    _, calm = run_batch(tables, output_dir=str(tmp_path / "calm"))
    assert calm["done"] == 200
    for table in tables:
        assert Outcome.of(tmp_path / "killed" / table["id"]) == Outcome.of(tmp_path / "calm" / table["id"])


@pytest.mark.slow
def test_an_interrupted_batch_saves_its_runs_and_goes_on(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    table = tiny_table(tiny_model, concepts, "mug", max_train_steps=2000, checkpointing_steps=2000)
    opened = Batch([table], BatchConfig(output_dir=str(tmp_path), workers=1))
    with pytest.raises(KeyboardInterrupt):
        interrupt_when_under_way(opened)
    assert opened.summary()["missing"] == 1
    assert max(int(path.name.partition("-")[2]) for path in (tmp_path / "mug").glob("checkpoint-*")) > 0


def interrupt_when_under_way(opened: Batch) -> None:
    for event in opened.events():
        if event and event.facts.get("step", 0) > 0:
            signal.raise_signal(signal.SIGINT)
