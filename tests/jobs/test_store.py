"""Runs whose folder is behind a URL."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from batch_tables import tiny_table
from short_run import Outcome

import dvar.jobs.train_job
from dvar.errors import FolderInUse, RefusedInput
from dvar.jobs.base_models import BaseModels
from dvar.jobs.batch import Batch
from dvar.jobs.config import BatchConfig
from dvar.jobs.job import Job
from dvar.jobs.read_jobs import read_jobs
from dvar.jobs.store import RemoteStore, read_run_json, run_folder, url_problems
from dvar.jobs.train_job import JobTrainer, begin_job
from dvar.locks import lock_path
from dvar.training.loop import StepRecord
from dvar.training.publish import repository_of


class Lost(Exception):
    """The end of a worker."""


@pytest.fixture(scope="module")
def models() -> BaseModels:
    return BaseModels()


def remote_job(model: Path, concepts: Path, folder: Path) -> Job:
    (job,) = read_jobs([tiny_table(model, concepts, "mug")], BatchConfig(output_dir=f"file://{folder}"))
    return job


def train(models: BaseModels, job: Job) -> Any:
    return JobTrainer(models)(job.to_json(), lambda **facts: None)


def list_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_run_behind_a_url_is_the_run_on_the_disk(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    facts = train(models, remote_job(tiny_model, concepts, tmp_path / "remote"))
    assert (facts["steps"], facts["cap"], facts["verdict"]) == (9, 9, "cap reached")
    (here,) = read_jobs([tiny_table(tiny_model, concepts, "mug")], BatchConfig(output_dir=str(tmp_path / "here")))
    train(models, here)
    assert list_files(tmp_path / "remote" / "mug") == list_files(tmp_path / "here" / "mug")
    assert Outcome.of(tmp_path / "remote" / "mug") == Outcome.of(tmp_path / "here" / "mug")
    assert not list((tmp_path / "remote" / "mug").glob("checkpoint-*"))
    assert read_run_json(f"file://{tmp_path}/remote/mug", "result.json")["steps"] == 9


def test_a_worker_that_is_lost_leaves_a_checkpoint_behind_the_url_and_the_next_one_goes_on(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = remote_job(tiny_model, concepts, tmp_path / "remote")
    train(models, remote_job(tiny_model, concepts, tmp_path / "reference"))
    steps: list[int] = []

    class LosesWorker(dvar.jobs.train_job._Pushes):
        def __call__(self, step: StepRecord) -> None:
            super().__call__(step)
            steps.append(step.step)
            if step.step == 6 and steps.count(6) == 1:
                raise Lost

    monkeypatch.setattr(dvar.jobs.train_job, "_Pushes", LosesWorker)
    with pytest.raises(Lost):
        train(models, job)
    assert (tmp_path / "remote" / "mug" / "checkpoint-4" / "manifest.json").exists()
    train(models, job)
    assert steps == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9]
    assert Outcome.of(tmp_path / "remote" / "mug") == Outcome.of(tmp_path / "reference" / "mug")


def test_what_makes_other_files_count_is_pushed_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RemoteStore(tmp_path / "local", f"file://{tmp_path}/remote")
    store.fetch()
    for name in ("checkpoint-4/manifest.json", "checkpoint-4/tensors", "result.json", "trace.jsonl"):
        path = store.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    order: list[str] = []
    put = store.system.put_file

    def put_file(path: str, target: str) -> None:
        order.append(Path(target).name)
        put(path, target)

    monkeypatch.setattr(store.system, "put_file", put_file)
    store.push()
    assert {*order[:2]} == {"tensors", "trace.jsonl"}
    shutil.rmtree(store.folder / "checkpoint-4")
    (store.folder / "trace.jsonl").write_text("longer than before")
    order.clear()
    store.push()
    assert order == ["trace.jsonl"]
    assert list_files(tmp_path / "remote") == {"result.json", "trace.jsonl"}


def test_a_push_removes_only_what_its_worker_fetched_or_stored(tmp_path: Path) -> None:
    store = RemoteStore(tmp_path / "local", f"file://{tmp_path}/remote")
    store.fetch()
    for name in ("checkpoint-4/tensors", "samples/step-000000/00.png"):
        (store.folder / name).parent.mkdir(parents=True)
        (store.folder / name).write_text("of this worker")
    store.push()
    (tmp_path / "remote" / "checkpoint-4" / "manifest.json").write_text("of another worker")
    shutil.rmtree(store.folder)
    store.folder.mkdir()
    store.push()
    assert list_files(tmp_path / "remote") == {"checkpoint-4/manifest.json"}
    assert not (tmp_path / "remote" / "samples").exists()


def test_a_run_that_changes_while_it_is_fetched_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tmp_path / "remote"
    for name in ("checkpoint-4/tensors", "checkpoint-4/manifest.json", "trace.jsonl"):
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_text(name)
    store = RemoteStore(tmp_path / "local", f"file://{remote}")
    get = store.system.get_file

    def replace_checkpoint(path: str, target: str) -> None:
        if (remote / "checkpoint-4" / "tensors").exists() and path.endswith("tensors"):
            (remote / "checkpoint-4").rename(remote / "checkpoint-8")
        get(path, target)

    monkeypatch.setattr(store.system, "get_file", replace_checkpoint)
    store.fetch()
    assert list_files(store.folder) == {"checkpoint-8/tensors", "checkpoint-8/manifest.json", "trace.jsonl"}
    monkeypatch.setattr(store.system, "get_file", lambda path, target: get(f"{path}-gone", target))
    with pytest.raises(FolderInUse, match="must not change while it is fetched, and a file that was listed is gone"):
        store.fetch()


def test_nothing_stays_on_the_machine_of_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed, alive = tmp_path / "dvar-job-1", tmp_path / "dvar-job-2"
    for folder in (killed, alive):
        (folder / "run").mkdir(parents=True)
    with lock_path(tmp_path / "dvar-job-2.lock", alive):
        with run_folder(f"file://{tmp_path}/remote", "mug") as store:
            assert store.folder.exists()
        assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [alive.name]


def test_a_run_behind_a_url_is_pushed_to_the_hub_under_the_id_of_its_job(
    tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    job = remote_job(tiny_model, concepts, tmp_path / "remote")
    with run_folder(job.config.output_dir, job.id) as store:
        assert repository_of(begin_job(job, store)) == "mug"


def test_two_workers_of_one_machine_do_not_share_a_folder(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/remote"
    with run_folder(url, "mug") as first:
        with run_folder(url, "mug") as second:
            assert first.folder != second.folder
        assert first.folder.exists()


def test_a_worker_whose_run_another_one_has_claimed_pushes_nothing_more(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = remote_job(tiny_model, concepts, tmp_path / "remote")
    train(models, remote_job(tiny_model, concepts, tmp_path / "reference"))
    run = tmp_path / "remote" / "mug"
    files: list[set[str]] = []

    class LosesRun(dvar.jobs.train_job._Pushes):
        def __call__(self, step: StepRecord) -> None:
            super().__call__(step)
            if step.step == 6 and not files:
                with run_folder(job.config.output_dir, job.id) as store:
                    begin_job(job, store)
                files.append(list_files(run))

    monkeypatch.setattr(dvar.jobs.train_job, "_Pushes", LosesRun)
    with pytest.raises(RefusedInput, match="one worker writes a run, and another has taken over the one in file://"):
        train(models, job)
    assert files == [list_files(run)]
    assert "checkpoint-4/manifest.json" in files[0]
    assert ".lock" not in files[0]
    train(models, job)
    assert Outcome.of(run) == Outcome.of(tmp_path / "reference" / "mug")


def test_logs_behind_a_url_are_in_a_folder_of_the_user(tiny_model: Path, concepts: Path, tmp_path: Path) -> None:
    opened = Batch([tiny_table(tiny_model, concepts, "mug")], BatchConfig(output_dir=f"file://{tmp_path}"))
    assert opened._task(opened.jobs[0]).log.parts[-3:] == (f"dvar-jobs-{os.getuid()}", "logs", "mug.log")


def test_a_url_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    assert url_problems(f"file://{tmp_path}/new") == []
    assert "a URL that fsspec knows, got nonsense://there" in url_problems("nonsense://there")[0]
    (tmp_path / "file").write_text("")
    assert "cannot" in url_problems(f"file://{tmp_path}/file/in")[0]


def test_a_damaged_file_counts_as_missing(tmp_path: Path) -> None:
    assert read_run_json(str(tmp_path), "result.json") is None
    (tmp_path / "result.json").write_text("{")
    assert read_run_json(str(tmp_path), "result.json") is None
    assert read_run_json(f"file://{tmp_path}", "result.json") is None
    (tmp_path / "result.json").write_text(json.dumps({"steps": 1}))
    assert read_run_json(f"file://{tmp_path}", "result.json") == {"steps": 1}


def test_a_folder_that_another_worker_still_writes_is_waited_for(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    from dvar.locks import lock_folder

    (job,) = read_jobs([tiny_table(tiny_model, concepts, "mug")], BatchConfig(output_dir=str(tmp_path)))
    lock = lock_folder(Path(job.config.output_dir))
    lock.__enter__()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            lock.__exit__(None, None, None)

    JobTrainer(models, sleep)(job.to_json(), lambda **facts: None)
    assert waits == [1.0, 1.0]
    (Path(job.config.output_dir) / "result.json").unlink()
    with lock_folder(Path(job.config.output_dir)), pytest.raises(RefusedInput, match="is being written"):
        JobTrainer(models, lambda seconds: None)(job.to_json(), lambda **facts: None)
