"""Workers that are lost before their job has a whole checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from batch_tables import tiny_table
from fsspec.implementations.local import LocalFileSystem
from short_run import Outcome

import dvar.training.personalise
from dvar.errors import RefusedInput
from dvar.files import remove
from dvar.jobs.base_models import BaseModels
from dvar.jobs.config import BatchConfig
from dvar.jobs.job import Job
from dvar.jobs.read_jobs import read_jobs
from dvar.jobs.status import read_status
from dvar.jobs.train_job import JobTrainer


class Lost(Exception):
    """The end of a worker."""


@pytest.fixture(scope="module")
def models() -> BaseModels:
    return BaseModels()


@pytest.fixture(scope="module")
def reference(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """The outcome of the job where no worker is lost."""
    folder = tmp_path_factory.mktemp("reference")
    train(models, read_job(tiny_model, concepts, str(folder)))
    return Outcome.of(folder / "mug")


def read_job(model: Path, concepts: Path, folder: str) -> Job:
    (job,) = read_jobs([tiny_table(model, concepts, "mug")], BatchConfig(output_dir=folder))
    return job


def train(models: BaseModels, job: Job) -> None:
    JobTrainer(models)(job.to_json(), lambda **facts: None)


@pytest.mark.parametrize("uploads", [1, 2, 3, 8, 10])
def test_a_worker_that_is_lost_in_its_first_push_leaves_a_job_that_the_next_one_trains(
    models: BaseModels,
    tiny_model: Path,
    concepts: Path,
    tmp_path: Path,
    reference: Outcome,
    monkeypatch: pytest.MonkeyPatch,
    uploads: int,
) -> None:
    job, stored = read_job(tiny_model, concepts, f"file://{tmp_path}"), list[str]()
    put = LocalFileSystem.put_file

    def lose_worker(system: LocalFileSystem, path: str, target: str) -> None:
        if len(stored) == uploads:
            raise Lost
        stored.append(Path(target).name)
        put(system, path, target)

    with monkeypatch.context() as patch:
        patch.setattr(LocalFileSystem, "put_file", lose_worker)
        with pytest.raises(Lost):
            train(models, job)
    assert stored[:2] == ["job.json", "config.json"][:uploads]
    assert (read_status(job).state, read_status(job).conflict) == ("missing", "")
    train(models, job)
    assert Outcome.of(tmp_path / "mug") == reference


@pytest.mark.parametrize("config", [None, b"", b'{"method": "textual'])
def test_a_job_is_begun_again_where_its_config_was_not_written_whole(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path, reference: Outcome, config: bytes | None
) -> None:
    job = read_job(tiny_model, concepts, str(tmp_path))
    train(models, job)
    (tmp_path / "mug" / "result.json").unlink()
    if config is None:
        (tmp_path / "mug" / "config.json").unlink()
    else:
        (tmp_path / "mug" / "config.json").write_bytes(config)
    train(models, job)
    assert Outcome.of(tmp_path / "mug") == reference


def test_a_worker_that_is_lost_while_it_removes_an_attempt_leaves_a_run(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = read_job(tiny_model, concepts, str(tmp_path))
    train(models, job)
    (tmp_path / "mug" / "result.json").unlink()

    def lose_worker(path: Path) -> None:
        remove(path)
        if path.name == "references":
            raise Lost

    with monkeypatch.context() as patch:
        patch.setattr(dvar.training.personalise, "remove", lose_worker)
        with pytest.raises(Lost):
            train(models, job)
    assert (tmp_path / "mug" / "config.json").exists()
    assert (tmp_path / "mug" / "samples").exists()


def test_what_no_run_wrote_is_never_replaced(
    models: BaseModels, tiny_model: Path, concepts: Path, tmp_path: Path
) -> None:
    (tmp_path / "mug").mkdir()
    (tmp_path / "mug" / "README.md").write_text("of one's own")
    job = read_job(tiny_model, concepts, str(tmp_path))
    for _ in range(2):
        with pytest.raises(RefusedInput, match=r"no run wrote README\.md"):
            train(models, job)
    assert (tmp_path / "mug" / "README.md").read_text() == "of one's own"
