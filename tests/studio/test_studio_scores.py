"""Likeness and obedience of samples, and the files that a run is exported to."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from fake_run import generate_trace, write_run

from dvar import mini
from dvar.errors import RefusedInput
from dvar.files import read_json, write_json
from dvar.runs.run_folder import RunFolder
from dvar.studio import commands
from dvar.studio.library import find_run
from dvar.studio.scores import find_clip, measure_scores, read_scores
from dvar.training.run_layout import RESULT

METHOD = "textual-inversion"


@pytest.fixture
def mug_run(tmp_path: Path) -> Path:
    """A finished run of a mug whose samples at step 0 are of a dog, and at step 60 the instance images themselves."""
    folder = write_run(tmp_path / "mug", generate_trace(steps=60), sampled_every=0, method=METHOD)
    write_json(folder / RESULT, {**read_json(folder / RESULT), "base_sha256": "0" * 64})
    mug, dog = (sorted(mini.concepts()[name].glob("*.png")) for name in ("red_striped_mug", "blue_dog"))
    for target, images in ((folder / "references", mug), (folder / "samples/step-000060", mug)):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for number, path in enumerate(images[:3]):
            shutil.copy(path, target / f"{number:02d}.png")
    (folder / "samples/step-000000").mkdir()
    for number, path in enumerate(dog[:3]):
        shutil.copy(path, folder / "samples/step-000000" / f"{number:02d}.png")
    rows = ", ".join('{"prompt": "a photo of <thing>", "seed": 0}' for _ in range(3))
    (folder / "samples/prompts.json").write_text(f"[{rows}]")
    return folder


@pytest.mark.slow
def test_the_instance_images_are_more_like_themselves_than_another_subject(mug_run: Path) -> None:
    run = RunFolder.open(mug_run)
    assert read_scores(run) is None
    scores = measure_scores(run)
    assert scores == read_scores(run)
    assert scores.clip == "the bundled scorer"
    assert scores.steps[60].likeness > scores.steps[0].likeness + 0.1
    assert scores.steps[60].obedience > scores.steps[0].obedience, "a photo of a mug"


@pytest.mark.slow
def test_a_step_that_has_scores_is_not_measured_again(mug_run: Path) -> None:
    run = RunFolder.open(mug_run)
    before = measure_scores(run)
    for path in run.samples[60]:
        path.write_bytes(b"no image")
    assert measure_scores(run) == before


def test_a_run_without_a_clip_at_hand_says_so(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "sd", generate_trace(steps=60), pretrained_model_name_or_path="owner/model", method=METHOD
    )
    run = RunFolder.open(folder)
    assert find_clip(run.settings) == ""
    with pytest.raises(RefusedInput, match="names no CLIP"):
        measure_scores(run)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the downloads, which is not Gradio's."""
    folder = tmp_path / ".downloads"
    folder.mkdir()
    monkeypatch.setattr(commands, "download_folder", lambda: folder)
    return folder


def test_weights_are_exported_as_one_file(mug_run: Path, downloads: Path) -> None:
    (mug_run / "learned_embeds.safetensors").write_bytes(b"weights")
    (mug_run / "README.md").write_text("card")
    path = commands.export(find_run(mug_run.parent, "mug"), commands.WEIGHTS)
    assert path.is_relative_to(downloads)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["learned_embeds.safetensors", "README.md"]


def test_a_run_has_one_file_for_a_download_and_none_where_it_cannot_be_made(mug_run: Path, downloads: Path) -> None:
    (mug_run / "learned_embeds.safetensors").write_bytes(b"weights")
    shutil.copytree(mug_run, mug_run.parent / "mug-2")
    other = commands.export(find_run(mug_run.parent, "mug-2"), commands.WEIGHTS)
    run = find_run(mug_run.parent, "mug")
    for _ in range(2):
        path = commands.export(run, commands.WEIGHTS)
    assert {file for file in downloads.rglob("*") if file.is_file()} == {path, other}
    write_json(mug_run / RESULT, {**read_json(mug_run / RESULT), "weights": ["../secret"]})
    with pytest.raises(RefusedInput):
        commands.export(run, commands.WEIGHTS)
    assert [*downloads.iterdir()] == [other.parent]


def test_weights_that_are_no_file_of_the_run_are_refused(mug_run: Path, downloads: Path) -> None:
    (mug_run.parent / "secret").write_text("secret")
    write_json(mug_run / RESULT, {**read_json(mug_run / RESULT), "weights": ["../secret"]})
    with pytest.raises(RefusedInput, match="must list the run's weight files"):
        commands.export(find_run(mug_run.parent, "mug"), commands.WEIGHTS)


def test_of_the_weights_of_the_best_step_only_files_of_the_run_are_exported(mug_run: Path, downloads: Path) -> None:
    names = ["learned_embeds.safetensors", "learned_embeds-step-40.safetensors"]
    for name in names:
        (mug_run / name).write_bytes(b"weights")
    (mug_run.parent / "secret").write_text("secret")
    best = [names[1], "../secret", str(mug_run.parent / "secret"), "config.json"]
    write_json(mug_run / RESULT, {**read_json(mug_run / RESULT), "best_weights": best})
    with zipfile.ZipFile(commands.export(find_run(mug_run.parent, "mug"), commands.WEIGHTS)) as archive:
        assert archive.namelist() == names


def test_other_programs_get_the_word_too_and_what_it_is_called(
    mug_run: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = "pytorch_lora_weights.safetensors"
    (mug_run / lora).write_bytes(b"weights")
    write_json(mug_run / RESULT, {**read_json(mug_run / RESULT), "weights": ["learned_embeds.safetensors", lora]})

    def run_command(words: list[str]) -> str:
        files = {Path(words[words.index(flag) + 1]) for flag in ("--kohya", "--embedding")}
        for file in files:
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"written")
        return "\n".join(map(str, sorted(files)))

    monkeypatch.setattr(commands, "run_command", run_command)
    with zipfile.ZipFile(commands.export(find_run(mug_run.parent, "mug"), commands.OTHERS)) as archive:
        names = ["mug/README.txt", "mug/mug-word.safetensors", "mug/mug.safetensors"]
        assert sorted(name for name in archive.namelist() if not name.endswith("/")) == names
        assert archive.read(names[0]) == b"mug-word.safetensors\nmug.safetensors"


@pytest.mark.parametrize("name", ["LoRA", "anything", "../x", None])
def test_a_format_that_the_run_does_not_have_is_refused(mug_run: Path, name: str) -> None:
    with pytest.raises(RefusedInput, match="cannot be exported"):
        commands.export(find_run(mug_run.parent, "mug"), name)
