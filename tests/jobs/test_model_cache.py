"""Base models behind a URL."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from batch_tables import tiny_table

from dvar.errors import ModelError
from dvar.jobs.base_models import BaseModels
from dvar.jobs.config import BatchConfig
from dvar.jobs.model_cache import cached_model
from dvar.jobs.read_jobs import read_jobs
from dvar.jobs.train_job import JobTrainer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DVAR_MODEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_model_is_copied_once_and_again_when_it_is_another(tmp_path: Path, tiny_model: Path, cache: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "model")
    first = cached_model(f"file://{source}")
    assert Path(first).parent == cache
    names = {path.relative_to(source) for path in source.rglob("*")}
    assert {path.relative_to(first) for path in Path(first).rglob("*")} == names
    before = os.stat(Path(first) / "model_index.json").st_mtime_ns
    assert cached_model(f"file://{source}") == first
    assert os.stat(Path(first) / "model_index.json").st_mtime_ns == before
    (source / "more.txt").write_text("")
    assert cached_model(f"file://{source}") != first


def test_a_url_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no model_index\.json: check the URL"):
        cached_model(f"file://{tmp_path}")


def test_a_job_trains_on_the_copy(tmp_path: Path, tiny_model: Path, concepts: Path, cache: Path) -> None:
    table = {**tiny_table(tiny_model, concepts, "mug"), "pretrained_model_name_or_path": f"file://{tiny_model}"}
    (job,) = read_jobs([table], BatchConfig(output_dir=str(tmp_path / "out")))
    JobTrainer(BaseModels())(job.to_json(), lambda **facts: None)
    config = json.loads((tmp_path / "out" / "mug" / "config.json").read_text())
    assert Path(config["pretrained_model_name_or_path"]).parent == cache
