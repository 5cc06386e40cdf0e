"""Jobs from files, folders and tables, and everything that is refused before the first of them."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from batch_tables import tiny_settings, write_toml

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import FREE_FIELDS
from dvar.errors import RefusedInput
from dvar.jobs.config import BatchConfig, batch_problems
from dvar.jobs.job import Job
from dvar.jobs.read_jobs import read_jobs
from dvar.testing import tiny_concept


def refuse(source: Any, **settings: Any) -> str:
    """Return the problems of jobs that are refused."""
    with pytest.raises(RefusedInput) as refused:
        read_jobs(source, BatchConfig(**settings))
    return str(refused.value)


@pytest.fixture
def shared(tiny_model: Path) -> dict[str, Any]:
    return tiny_settings(tiny_model, initializer_token="mug")


def test_a_table_of_toml_has_the_settings_of_all_jobs_and_its_own(
    tmp_path: Path, concepts: Path, shared: dict[str, Any]
) -> None:
    tables: list[dict[str, Any]] = [
        {"instance_data_dir": str(concepts / "mug")},
        {"id": "lora", "method": "dreambooth-lora", "instance_data_dir": str(concepts / "ball"), "max_train_steps": 20},
    ]
    path = write_toml(tmp_path / "jobs.toml", {**shared, "placeholder_token": "<it>"}, tables)
    first, second = read_jobs(path, BatchConfig(output_dir=str(tmp_path / "out")))
    assert [first.id, second.id] == ["mug", "lora"]
    assert isinstance(first.config, TextualInversionConfig)
    assert isinstance(second.config, DreamBoothLoraConfig)
    assert [job.config.max_train_steps for job in (first, second)] == [9, 20]
    assert [job.config.placeholder_token for job in (first, second)] == ["<it>", "<it>"]
    assert [Path(job.config.output_dir) for job in (first, second)] == [
        tmp_path / "out" / "mug",
        tmp_path / "out" / "lora",
    ]
    assert first.config.checkpoints_total_limit == 1
    assert Job.from_json(second.to_json()) == second


def test_cells_of_csv_become_values_of_their_settings(tmp_path: Path, concepts: Path, shared: dict[str, Any]) -> None:
    columns = {**shared, "id": "it", "instance_data_dir": concepts / "mug", "max_grad_norm": 0.5, "seed": ""}
    path = tmp_path / "jobs.csv"
    path.write_text(
        ",".join(columns)
        + "\n"
        + ",".join(str(value).lower() if isinstance(value, bool) else str(value) for value in columns.values())
        + "\n\n"
    )
    (job,) = read_jobs(path, BatchConfig())
    config = job.config
    assert (config.max_train_steps, config.max_grad_norm, config.random_flip, config.seed) == (9, 0.5, False, 0)
    path.write_text(path.read_text().replace(",9,", ",nine,").replace("false", "perhaps"))
    problems = refuse(path)
    assert "max_train_steps must be a whole number, got 'nine'" in problems
    assert "random_flip must be true or false, got 'perhaps'" in problems


def test_each_folder_of_a_folder_is_a_job_with_the_noun_beside_it(
    tmp_path: Path, concepts: Path, shared: dict[str, Any]
) -> None:
    settings = tmp_path / "settings.toml"
    del shared["initializer_token"]
    write_toml(settings, shared, [])
    jobs = read_jobs(concepts, BatchConfig(config=str(settings)))
    assert [job.id for job in jobs] == ["ball", "mug", "torn"]
    assert {job.config.initializer_token for job in jobs} == {"mug"}
    jobs = read_jobs(concepts, BatchConfig(config=str(settings), method="custom-diffusion"))
    assert {job.config.class_noun for job in jobs if isinstance(job.config, CustomDiffusionConfig)} == {"mug"}


def test_a_low_cap_scales_what_counts_steps(tmp_path: Path, concepts: Path) -> None:
    images = {"instance_data_dir": str(concepts / "mug"), "initializer_token": "mug"}
    tables: list[dict[str, Any]] = [{"id": "short", "max_train_steps": 60, **images}, {"id": "whole", **images}]
    short, whole = read_jobs(tables, BatchConfig(output_dir=str(tmp_path)))
    assert (short.config.window, whole.config.window) == (23, 200)  # 200 · 60 / ceil(200 / √0.15)
    assert "scaled to 60: window 23 instead of 200" in short.scaled
    assert not whole.scaled


def test_paths_do_not_depend_on_where_a_worker_runs(
    concepts: Path, shared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(concepts)
    table = {**shared, "instance_data_dir": "mug", "sample_prompts": "mug.json", "single_file_config": "ball"}
    (job,) = read_jobs([table], BatchConfig(output_dir="out"))
    assert job.config.instance_data_dir == str(concepts / "mug")
    assert job.config.sample_prompts == str(concepts / "mug.json")
    assert job.config.single_file_config == str(concepts / "ball")
    assert job.config.output_dir == str(concepts / "out" / "mug")
    (job,) = read_jobs([{**shared, "instance_data_dir": "mug"}], BatchConfig(output_dir="s3://bucket/out/"))
    assert job.config.output_dir == "s3://bucket/out/mug"


def test_the_digest_is_of_what_a_run_computes(tmp_path: Path, concepts: Path, shared: dict[str, Any]) -> None:
    def digest(**changes: Any) -> str:
        table = {"id": "it", "instance_data_dir": str(concepts / "mug"), **shared, **changes}
        return read_jobs([table], BatchConfig(output_dir=str(tmp_path)))[0].digest

    same = [digest(), digest(checkpointing_steps=1), digest(id="other")]
    assert len({*same}) == 1
    assert len({*same, digest(seed=1), digest(keep="best"), digest(instance_data_dir=str(concepts / "torn"))}) == 4


def test_the_digest_of_a_plain_job_stays_what_it_was(tmp_path: Path) -> None:
    (tmp_path / "images" / ".thumbnails").mkdir(parents=True)
    for name in ("0.png", "0.txt", ".thumbnails/0.png"):
        (tmp_path / "images" / name).write_text(name)
    config = TextualInversionConfig(instance_data_dir=str(tmp_path / "images"), initializer_token="mug")
    settings = {name: value for name, value in config.to_dict().items() if name == "keep" or name not in FREE_FIELDS}
    digest = sha256(json.dumps(settings, sort_keys=True).encode())
    for name in ("0.png", "0.txt"):
        digest.update(name.encode() + b"\0" + sha256(name.encode()).digest())
    assert Job("it", config).digest == digest.hexdigest()


def test_the_digest_is_of_all_files_that_a_run_reads(tmp_path: Path, shared: dict[str, Any]) -> None:
    folders = {name: tiny_concept(tmp_path / name) for name in ("kohya/10_mug", "listed", "class")}
    entry = {"instance_prompt": "a <new1> mug", "class_prompt": "mug"}
    entry |= {"instance_data_dir": str(folders["listed"]), "class_data_dir": str(folders["class"])}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    (tmp_path / "prompts.txt").write_text("a mug")
    listed = {**shared, "id": "it", "method": "custom-diffusion", "concepts_list": str(tmp_path / "list.json")}
    listed |= {"initializer_token": "ktn", "placeholder_token": "<new1>", "validation_prompt": "a <new1> mug"}
    kohya = {**shared, "id": "it", "instance_data_dir": str(tmp_path / "kohya")}
    prompted = {**kohya, "sample_prompts": str(tmp_path / "prompts.txt")}

    def digest(table: dict[str, Any]) -> str:
        return read_jobs([table], BatchConfig(output_dir=str(tmp_path / "out")))[0].digest

    for table, path in (
        (kohya, folders["kohya/10_mug"] / "00.png"),
        (listed, folders["listed"] / "00.png"),
        (listed, folders["class"] / "00.png"),
        (prompted, tmp_path / "prompts.txt"),
    ):
        before = digest(table)
        path.write_bytes(path.read_bytes() + b"changed")
        assert digest(table) != before
    before = digest(kohya)
    folders["kohya/10_mug"].rename(tmp_path / "kohya" / "20_mug")
    assert digest(kohya) != before


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", ".thumbnails/00.png"])
def test_the_digest_is_not_of_what_a_file_manager_leaves(name: str, tmp_path: Path, shared: dict[str, Any]) -> None:
    folder = tiny_concept(tmp_path / "mug")

    def digest() -> str:
        table = {**shared, "id": "it", "instance_data_dir": str(folder)}
        return read_jobs([table], BatchConfig(output_dir=str(tmp_path / "out")))[0].digest

    before = digest()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"view")
    assert digest() == before


def test_a_file_that_is_not_there_is_refused(tmp_path: Path, concepts: Path, shared: dict[str, Any]) -> None:
    table = {**shared, "id": "it", "instance_data_dir": str(concepts / "mug"), "sample_prompts": "none.txt"}
    assert "sample_prompts must be a file, and none.txt is none: check the path" in refuse([table])


def test_every_problem_of_every_job_is_named_at_once(tmp_path: Path, concepts: Path, shared: dict[str, Any]) -> None:
    images = str(concepts / "mug")
    tables: list[dict[str, Any]] = [
        {"id": "a", "instance_data_dir": images, "sede": 1, "seed": -2},
        {"id": "b", "instance_data_dir": images, "sede": 1, "placeholder_token": "<b>", "method": "dreambooth-lora"},
        {"id": "c", "instance_data_dir": images, "method": "textual-invasion"},
        {"id": "d", "instance_data_dir": images, "seed": -1},
        {"id": "e", "instance_data_dir": str(concepts / "cup")},
        {"id": "f", "instance_data_dir": images, "overwrite": True},
        {"id": "../g", "instance_data_dir": images},
        {"id": "h", "instance_data_dir": images},
        {"id": "h", "instance_data_dir": images},
        {"id": "i", "instance_data_dir": images, "output_dir": str(tmp_path / "out")},
        {"id": "j", "instance_data_dir": images, "output_dir": f"{tmp_path}/there/../out"},
    ]
    problems = refuse(write_toml(tmp_path / "jobs.toml", shared, tables))
    for part in (
        "jobs.toml, job a, b: unknown setting 'sede': the nearest known one is seed",
        "job c: there is no method 'textual-invasion': the nearest is textual-inversion",
        "job a: seed must be at least 0",
        "job d: seed must be at least 0",
        f"job e: instance_data_dir must be a folder, and {concepts / 'cup'} is none",
        "job f: overwrite is decided by the batch, got True: drop it",
        "job ../g: id must be letters",
        "each job needs an id of its own, got 'h' twice",
        f"each job needs a folder of its own, and j and i share {tmp_path / 'out'}: change one",
    ):
        assert part in problems
    assert len(problems.splitlines()) == 9


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("jobs.toml", "", "must hold at least one job, got none"),
        ("jobs.toml", "[job]\nid = 'a'", r"must have a table \[\[job\]\] for each job"),
        ("jobs.toml", "a = ", "is not valid TOML"),
        ("jobs.csv", "id,seed,id\n", "column 'id' is there twice"),
        ("jobs.csv", "id,seed\na,1,2\n", "line 2 has more cells than there are columns"),
        ("jobs.csv", "id\n", "must hold at least one job"),
        ("jobs.txt", "", "must be a .toml or .csv file or a folder of folders"),
        ("other/jobs.toml", None, "cannot be read"),
        ("other", None, "which does not exist"),
    ],
)
def test_a_source_that_holds_no_jobs_is_refused(tmp_path: Path, name: str, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(RefusedInput, match=problem):
        read_jobs(tmp_path / name, BatchConfig())


def test_every_folder_without_images_is_refused(tmp_path: Path) -> None:
    for name in ("bare", "empty"):
        (tmp_path / name).mkdir()
    tiny_concept(tmp_path / "mug")
    (tmp_path / "mug.json").write_text("{}")
    problems = refuse(tmp_path).splitlines()
    assert len(problems) == 3
    assert "must hold images, and bare has none" in problems[0]
    assert "must hold images, and empty has none" in problems[1]
    assert "mug.json" in problems[2]


def test_an_unknown_column_of_blank_cells_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text("id,sede,class_noun,noun,,seed\na,,,,,-1\n")
    problems = refuse(path).splitlines()
    assert problems[0] == f"{path}: column 'sede' is no setting of any method: rename or remove it"
    assert "job a: seed must be at least 0" in problems[1]
    assert not any("class_noun" in problem for problem in problems)


def test_settings_of_a_batch_are_checked() -> None:
    assert batch_problems(BatchConfig()) == []
    problems = batch_problems(BatchConfig(workers=0, retries=-1, output_dir=" ", gpus_per_worker=0.5))
    assert len(problems) == 4
    assert batch_problems(BatchConfig(ray="auto", gpus_per_worker=1.5)) == [
        "gpus_per_worker above 1 must be whole, got 1.5: round it"
    ]
