"""The checks before a run: its rule, model folder, output folder and packages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.model_files import model_problems
from dvar.stopping.rules import MIN_RECORDS
from dvar.training import rule, run_layout
from dvar.training.packages import optimizer_problems, tracker_problems


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(instance_data_dir=str(image_folder), output_dir=str(tmp_path / "run"))


# The rule


@pytest.mark.parametrize("probe_every", range(1, 60))
def test_a_cadence_is_accepted_when_a_window_holds_enough_evaluations(
    config: TextualInversionConfig, probe_every: int
) -> None:
    # At a record t, the window (t - N, t] holds the multiples of the cadence in it.
    evaluations = sum(step % probe_every == 0 for step in range(100 * probe_every - 310 + 1, 100 * probe_every + 1))
    assert (rule.problems(replace(config, probe_every=probe_every)) == []) == (evaluations >= MIN_RECORDS)


# The model's folder


PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def create_model_folder(folder: Path, *missing: str) -> Path:
    for part in set(PARTS) - set(missing):
        (folder / part).mkdir(parents=True)
    if "model_index.json" not in missing:
        (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")
    return folder


def test_a_complete_model_folder_is_accepted(tiny_model: Path) -> None:
    assert model_problems(str(tiny_model)) == []
    assert model_problems("mini") == []


@pytest.mark.parametrize("part", ["model_index.json", *PARTS])
def test_a_missing_part_of_a_model_folder_is_named(tmp_path: Path, part: str) -> None:
    (problem,) = model_problems(str(create_model_folder(tmp_path / "model", part)))
    assert f"it lacks {part}:" in problem


def test_a_folder_without_a_model_is_refused(image_folder: Path) -> None:
    (problem,) = model_problems(str(image_folder))
    assert "is no diffusers pipeline, it lacks model_index.json: name" in problem


def test_a_single_file_that_is_damaged_is_refused_as_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (problem,) = model_problems(str(tmp_path / "model.safetensors"))
    assert "model.safetensors is damaged or no safetensors file" in problem


@pytest.mark.parametrize("name", ["./sd15", "/no/such/model", "models/here/sd15", "sd15", "two words/x", "~/nowhere"])
def test_a_name_that_is_neither_a_folder_nor_a_hub_id_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (problem,) = model_problems(name)
    assert f"model {name} is neither a folder here nor a hub id" in problem


@pytest.mark.parametrize("name", ["owner/model", "stable-diffusion-v1-5/stable-diffusion-v1-5", "a/b.c"])
def test_a_hub_id_that_is_not_in_the_cache_needs_a_network(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = f"{name} is not in the cache and there is no network: connect once, or name a folder"
    assert model_problems(name) == [message]


def test_a_mistyped_path_like_a_hub_id_suggests_the_nearest_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    create_model_folder(tmp_path / "models" / "sd-v15")
    (problem,) = model_problems("models/sd15")
    assert "did you mean models/sd-v15?" in problem


# The run's folder and its tracker


@pytest.mark.parametrize("name", ["config.json", "trace.jsonl", "result.json", "README.md", "checkpoint-40"])
def test_another_run_is_never_overwritten_by_default(config: TextualInversionConfig, name: str) -> None:
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / name).touch()
    (problem,) = run_layout.problems(config)
    assert "holds another run" in problem
    assert "--overwrite" in problem
    (problem,) = run_layout.problems(replace(config, overwrite=True))
    assert problem.startswith(f"overwrite replaces what a run wrote, and no run wrote {name} in ")


def test_an_output_folder_has_a_name(config: TextualInversionConfig) -> None:
    for name in ("", " "):
        (problem,) = run_layout.problems(replace(config, output_dir=name, overwrite=True))
        assert problem == f"output_dir must name a folder, got {name!r}: give one, such as runs/mug"


def test_a_folder_with_unrelated_files_is_accepted(config: TextualInversionConfig) -> None:
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "notes.txt").touch()
    assert run_layout.problems(config) == []


def test_a_file_is_refused_as_an_output_folder(config: TextualInversionConfig) -> None:
    Path(config.output_dir).touch()
    (problem,) = run_layout.problems(config)
    assert "is a file" in problem


def test_an_output_folder_that_is_the_image_folder_is_refused(
    config: TextualInversionConfig, image_folder: Path
) -> None:
    (problem,) = run_layout.problems(replace(config, output_dir=f"{image_folder}/../images"))
    assert "must not be the folder of the images" in problem


@pytest.mark.parametrize(
    ("checkpoint", "existing", "message"),
    [
        ("latest", [], "holds no checkpoint"),
        ("checkpoint-20", ["checkpoint-10"], "holds checkpoint-10"),
        ("latest", ["checkpoint-10"], None),
        ("checkpoint-10", ["checkpoint-10"], None),
        ("some/where/checkpoint-10", ["checkpoint-10"], None),
    ],
)
def test_a_checkpoint_to_resume_from_must_exist(
    config: TextualInversionConfig, checkpoint: str, existing: list[str], message: str | None
) -> None:
    for name in (*existing, "samples"):
        (Path(config.output_dir) / name).mkdir(parents=True)
    (Path(config.output_dir) / "config.json").touch()
    problems = run_layout.problems(replace(config, resume_from_checkpoint=checkpoint))
    assert len(problems) == (message is not None)
    assert message is None or message in problems[0]


def test_a_tracker_that_is_not_installed_is_refused() -> None:
    assert tracker_problems("none") == []
    assert tracker_problems("json") == []  # any importable package will do
    (problem,) = tracker_problems("no_such_tracker")
    assert "pip install no_such_tracker" in problem


def test_an_optimizer_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert optimizer_problems("adamw") == optimizer_problems("sam") == []
    (problem,) = optimizer_problems("prodigy")
    assert problem == "optimizer prodigy needs the package prodigyopt, which is not installed: pip install prodigyopt"
    assert "pip install bitsandbytes" in optimizer_problems("adamw8bit")[0]
