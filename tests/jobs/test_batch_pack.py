"""Batches whose workers train several jobs in one forward pass: each worker is a real process."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_tables import tiny_table, write_toml
from command_line import dvar
from packed_runs import assert_equal_runs

import dvar as package
from dvar.errors import RefusedInput
from dvar.jobs.base_models import BaseModels
from dvar.jobs.batch import Batch
from dvar.jobs.config import BatchConfig
from dvar.jobs.job import Job
from dvar.jobs.read_jobs import Table, read_jobs
from dvar.jobs.train_pack import JobPack
from dvar.locks import lock_folder
from dvar.training.personalise import personalise


def train_alone(table: Table, folder: Path) -> Path:
    """Return the folder of a job that is trained without a batch; like a batch's, it keeps no checkpoint."""
    (job,) = read_jobs([table], BatchConfig(output_dir=str(folder)))
    run = personalise(replace(job.config, output_dir=str(folder / "alone"))).folder
    for path in run.glob("checkpoint-*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return run


def assert_same_but_for_the_job(run: Path, reference: Path) -> None:
    (run / "job.json").unlink()
    assert_equal_runs(run, reference)


@pytest.mark.slow
def test_five_jobs_in_packs_of_two_are_their_runs_and_bad_ones_fail_by_themselves(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    lora = tiny_table(tiny_model, concepts, "mug", method="dreambooth-lora", instance_prompt="a photo of dog")
    del lora["initializer_token"]
    tables: dict[str, dict[str, Any]] = {
        "word": tiny_table(tiny_model, concepts, "mug"),
        "torn": tiny_table(tiny_model, concepts, "torn"),
        "nan": tiny_table(tiny_model, concepts, "ball", learning_rate=1e30),
        "late": tiny_table(tiny_model, concepts, "ball", seed=3, max_train_steps=10),
        "lora": lora,
    }
    tables = {name: {**table, "id": name} for name, table in tables.items()}
    path, out = write_toml(tmp_path / "jobs.toml", {}, list(tables.values())), tmp_path / "out"
    answer = dvar("batch", path, "--output_dir", out, "--workers", 1, "--pack", 2, "--retries", 0, "--json")
    assert answer.status == 1, answer.err
    rows = [json.loads(line) for line in answer.out.splitlines()]
    ends = {row["job"]: row for row in rows if row["event"] in ("done", "failed")}
    assert {name: row["event"] for name, row in ends.items()} == {
        **dict.fromkeys(("word", "late", "lora"), "done"),
        **dict.fromkeys(("torn", "nan"), "failed"),
    }
    assert "is not an image that can be read" in ends["torn"]["reason"]
    assert "not finite" in ends["nan"]["reason"]
    assert {row["worker"] for row in rows} == {"worker-1.1", "worker-1.2"}
    assert "dvar: torn: " in (out / "logs" / "worker-1.log").read_text()
    assert (ends["late"]["steps"], ends["word"]["steps"]) == (10, 9)
    for name in ("word", "late", "lora"):
        assert_same_but_for_the_job(out / name, train_alone(tables[name], tmp_path / f"{name}-alone"))


@pytest.mark.slow
def test_an_interrupted_batch_saves_the_runs_of_its_packs_and_goes_on_in_others(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = tiny_table(tiny_model, concepts, "mug", max_train_steps=60)
    tables = [{**table, "seed": seed, "id": f"mug-{seed}"} for seed in range(3)]
    opened = Batch(tables, BatchConfig(output_dir=str(tmp_path / "out"), workers=1, pack=3))
    with pytest.raises(KeyboardInterrupt):
        interrupt_when_under_way(opened)
    assert opened.summary()["missing"] == 3
    assert len(list((tmp_path / "out").glob("*/checkpoint-*"))) == 3
    kinds = [event.kind for event in package.batch(tables, output_dir=str(tmp_path / "out"), workers=1, pack=2)]
    assert kinds.count("done") == 3
    for table in tables:
        run = tmp_path / "out" / table["id"]
        for path in run.glob("trace.jsonl.*"):
            path.unlink()
        assert_same_but_for_the_job(run, train_alone(table, tmp_path / f"{table['id']}-alone"))


def interrupt_when_under_way(opened: Batch) -> None:
    for event in opened.events():
        if event and event.facts.get("step", 0) > 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
@pytest.mark.usefixtures("one_ray")
def test_packs_on_ray(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    tables = [{**tiny_table(tiny_model, concepts, "mug", seed=seed), "id": f"mug-{seed}"} for seed in range(3)]
    try:
        events = list(package.batch(tables, output_dir=str(tmp_path), workers=1, pack=2, ray="auto"))
    finally:
        ray.shutdown()
    assert sorted(event.job for event in events if event.kind == "done") == ["mug-0", "mug-1", "mug-2"]
    assert {event.worker for event in events} == {"ray-1.1", "ray-1.2"}


def test_jobs_that_cannot_share_a_pass_are_refused_by_name(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    table = tiny_table(tiny_model, concepts, "mug")
    custom = {**table, "id": "custom", "method": "custom-diffusion", "class_noun": "mug", "initializer_token": "ktn"}
    with pytest.raises(RefusedInput) as refused:
        Batch([table, custom], BatchConfig(output_dir=str(tmp_path), pack=2))
    (problem,) = refused.value.problems
    assert problem.startswith("jobs, job custom: runs of a pack share one frozen denoising network")
    assert len(Batch([table, custom], BatchConfig(output_dir=str(tmp_path))).missing) == 2
    with pytest.raises(RefusedInput, match="pack must be"):
        Batch([table], BatchConfig(output_dir=str(tmp_path), pack=0))


class Driver:
    """Drives the jobs of a pack in this process, and notes when each one begins and ends."""

    def __init__(self, pack: JobPack) -> None:
        self.pack, self.notes = pack, list[tuple[str, str]]()

    def add(self, job: Job) -> None:
        def report(**facts: Any) -> None:
            if facts["step"] == 0:
                self.notes.append((job.id, "begins"))

        self.pack.add(job.id, job.to_json(), report)

    def run(self) -> list[tuple[str, str]]:
        while len(self.pack):
            for name, end in self.pack.advance().items():
                self.notes.append((name, "is done" if isinstance(end, dict) else repr(end)))
        return self.notes


def read(tables: list[dict[str, Any]], folder: Path) -> list[Job]:
    return read_jobs(tables, BatchConfig(output_dir=str(folder)))


@pytest.mark.slow
def test_a_job_of_another_base_model_begins_once_the_others_have_ended(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table = tiny_table(tiny_model, concepts, "mug", validation_steps=50)
    tables = [{**table, "id": "a"}, {**table, "id": "b", "allow_tf32": True}, {**table, "id": "c", "seed": 2}]
    driver = Driver(JobPack(BaseModels()))
    for job in read(tables, tmp_path):
        driver.add(job)
    notes = driver.run()
    assert notes == [(name, word) for name in "abc" for word in ("begins", "is done")]
    tables[1]["id"], tables[1]["allow_tf32"] = "d", False
    driver = Driver(JobPack(BaseModels()))
    for job in read([tables[1], {**table, "id": "e"}], tmp_path):
        driver.add(job)
    assert [name for name, _ in driver.run()] == ["d", "e", "d", "e"]


@pytest.mark.slow
def test_a_job_waits_for_the_worker_that_is_still_saving_it_and_for_no_cancelled_one(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    table, waits = tiny_table(tiny_model, concepts, "mug", validation_steps=50), []
    jobs = read([{**table, "id": "held"}, {**table, "id": "cancelled"}], tmp_path)
    lock = lock_folder(Path(jobs[0].config.output_dir))
    lock.__enter__()

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        lock.__exit__(None, None, None)
        for member in driver.pack._members.values():
            member.due = 0.0

    driver = Driver(JobPack(BaseModels(), sleep))
    for job in jobs:
        driver.add(job)
    driver.pack.cancel("cancelled")
    assert driver.run() == [("cancelled", "KeyboardInterrupt()"), ("held", "begins"), ("held", "is done")]
    assert waits == [1.0]
    driver.add(jobs[0])  # again, as after the loss of its worker
    assert driver.run()[-1] == ("held", "is done")
