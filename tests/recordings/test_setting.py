"""Folders and headers of recordings under several settings: none collide, and each says what it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_record import write_fake_record
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dvar import mini
from dvar.errors import RefusedInput
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.archive_file import read_traces, write_traces
from dvar.recordings.concept_images import (
    MAX_IMAGES,
    list_image_files,
    render_further_images,
    render_unseen_images,
    write_training_images,
)
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.setting import format_variant, split_folder_name
from dvar.recordings.spec import CONDITIONS, RecordingSpec

BASE = RecordingSpec("dreambooth-lora", "red_striped_mug", records="r")


def folder_name(**changed: Any) -> str:
    settings = tuple(changed.pop("settings", {}).items())
    return (
        replace(BASE, settings=settings, **changed).folder.relative_to("r/dreambooth-lora/red_striped_mug").as_posix()
    )


def test_a_recording_under_the_preset_s_settings_is_named_by_its_seed() -> None:
    assert folder_name() == "0"
    assert folder_name(seed=3) == "3"
    preset = BASE.config
    assert folder_name(settings={"learning_rate": preset.learning_rate, "train_batch_size": 4}) == "0"
    assert BASE.setting == {}


def test_when_a_run_is_judged_or_sampled_does_not_name_it() -> None:
    judged = {"window": 50, "threshold": 0.2, "validation_steps": 7, "num_validation_images": 2}
    assert folder_name(settings=judged) == "0"


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"settings": {"learning_rate": 0.00025}}, "0,learning_rate=0.00025"),
        ({"settings": {"learning-rate": 4e-3}}, "0,learning_rate=0.004"),
        ({"settings": {"train_batch_size": 1}}, "0,train_batch_size=1"),
        ({"settings": {"rank": 16}}, "0,rank=16"),
        ({"settings": {"initializer": "random"}}, "0,initializer=random"),
        ({"images": 1, "seed": 2}, "2,images=1"),
        ({"model": "mini-flow"}, "0,model=mini-flow"),
        ({"model": "/some/where/sd-1.5/"}, "0,model=sd-1.5"),
    ],
)
def test_every_other_setting_is_in_the_name(changed: dict[str, Any], name: str) -> None:
    assert folder_name(**changed) == name
    seed, variant = split_folder_name(name)
    assert f"{seed}{variant}" == name


def test_a_number_of_images_that_is_the_concept_s_own_is_no_change() -> None:
    own = len(list_image_files(mini.concepts()[BASE.concept]))
    assert replace(BASE, images=own).folder == BASE.folder
    assert replace(BASE, images=own).config == BASE.config


values = st.one_of(st.floats(1e-9, 1), st.integers(1, 64), st.text("a/,= é", max_size=150))
changes = st.dictionaries(st.sampled_from(["a", "b", "c"]), values, max_size=3)


@given(changes, changes)
def test_different_settings_have_different_names(first: dict[str, Any], second: dict[str, Any]) -> None:
    texts = [{name: str(value) for name, value in sorted(each.items())} for each in (first, second)]
    names = [format_variant({name: {"value": value} for name, value in sorted(each.items())}) for each in texts]
    assert (names[0] == names[1]) == (texts[0] == texts[1])
    assert all(len(name) < 200 and "/" not in name for name in names)


def test_a_recording_from_before_settings_were_in_the_name_keeps_its_folder(tmp_path: Path) -> None:
    faster = replace(BASE, records=str(tmp_path), settings=(("learning_rate", 4e-3),))
    plain = tmp_path / BASE.method / BASE.concept / "0"
    plain.mkdir(parents=True)
    (plain / CONDITIONS).write_text(json.dumps(faster.conditions))
    assert faster.folder == plain
    assert not faster.find_conflict()
    assert replace(faster, settings=(("learning_rate", 2e-3),)).folder.name == "0,learning_rate=0.002"


def test_a_longer_recording_of_the_same_setting_is_a_conflict(tmp_path: Path) -> None:
    base = replace(BASE, records=str(tmp_path))
    base.folder.mkdir(parents=True)
    (base.folder / CONDITIONS).write_text(json.dumps(base.conditions))
    longer = replace(base, length=2.0)
    assert longer.config.max_train_steps == 2 * base.config.max_train_steps
    assert "was recorded under another settings" in longer.find_conflict()


def test_images_are_the_concept_s_own_and_then_others(tmp_path: Path) -> None:
    own = mini.concepts()["red_striped_mug"]
    write_training_images(own, tmp_path / "1", 1, bundled=True)
    assert [path.name for path in list_image_files(tmp_path / "1")] == [list_image_files(own)[0].name]
    write_training_images(own, tmp_path / "10", 10, bundled=True)
    files = list_image_files(tmp_path / "10")
    assert len(files) == 10
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in files]
    assert len({image.tobytes() for image in pixels}) == 10, "every image is another one"
    assert {image.shape for image in pixels} == {pixels[0].shape}


def test_further_images_are_the_same_each_time_and_no_unseen_ones() -> None:
    once, again = render_further_images("red_striped_mug", 7), render_further_images("red_striped_mug", 9)
    assert [image.tobytes() for image in once] == [image.tobytes() for image in again[:7]]
    unseen = {image.tobytes() for image in render_unseen_images("red_striped_mug")}
    assert unseen.isdisjoint({image.tobytes() for image in again})


@pytest.mark.parametrize("count", [0, MAX_IMAGES + 1])
def test_a_number_of_images_that_cannot_be_had_is_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(RefusedInput, match=f"images of red_striped_mug must be from 1 to {MAX_IMAGES}, got {count}"):
        write_training_images(mini.concepts()["red_striped_mug"], tmp_path / "n", count, bundled=True)


def test_images_of_one_s_own_are_not_rendered(tmp_path: Path) -> None:
    own = tmp_path / "ball"
    own.mkdir()
    for index in range(3):
        Image.new("RGB", (8, 8), (80 * index, 0, 0)).save(own / f"{index}.png")
    write_training_images(own, tmp_path / "2", 2, bundled=False)
    assert [path.name for path in list_image_files(tmp_path / "2")] == ["0.png", "1.png"]
    with pytest.raises(RefusedInput, match="must be from 1 to 3, got 4"):
        write_training_images(own, tmp_path / "4", 4, bundled=False)
    (own / "0.txt").write_text("a caption")
    with pytest.raises(RefusedInput, match=r"none has a caption of its own, got 0\.txt"):
        write_training_images(own, tmp_path / "1", 1, bundled=False)


def test_one_image_to_train_on_is_scored_by_all_of_the_concept_s(tmp_path: Path) -> None:
    spec = replace(BASE, records=str(tmp_path), images=1)
    concept = spec.validate()
    assert len(concept.images) == 1
    assert spec.reference_paths(concept) == list_image_files(mini.concepts()[BASE.concept])
    assert spec.conditions["measured"]["images"] == 1
    assert "images" not in BASE.conditions["measured"]


def test_a_folder_that_names_no_seed_is_refused(tmp_path: Path) -> None:
    folder = write_fake_record(tmp_path, cap=40)
    with pytest.raises(RefusedInput, match="must be named by a seed, such as 0, got 'first'"):
        RecordedRun.open(folder.rename(folder.with_name("first")))


def test_no_table_mixes_settings_and_a_file_keeps_them_apart(tmp_path: Path) -> None:
    write_fake_record(tmp_path, cap=40)
    for value in (0.02, 0.00125):
        setting = {"learning_rate": {"value": value, "preset": 0.005}}
        write_fake_record(tmp_path, cap=40, setting=setting)
    write_fake_record(tmp_path, "dreambooth-lora", cap=40, setting={"model": {"value": "other", "preset": "mini"}})
    archive = RecordingArchive.open(tmp_path)
    assert [run.name for run in archive.runs_of("textual-inversion")] == ["textual-inversion/red_mug/0"]
    assert [run.variant for run in archive.runs_of("dreambooth-lora")] == [",model=other"]
    names = {run.name: run.setting for run in archive}
    assert names["textual-inversion/red_mug/0,learning_rate=0.02"]["learning_rate"]["value"] == 0.02
    assert len(names) == 4
    back = read_traces(write_traces(archive, tmp_path / "traces.npz"))
    assert {run.name: run.setting for run in back} == names
    assert len(RecordingArchive.join([back, archive])) == 4
