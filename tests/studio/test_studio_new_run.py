"""A new run: its draft on disk, its settings from the form, and what preflight says of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_run import generate_trace, write_run
from PIL import Image

from dvar import mini
from dvar.config.presets import configure
from dvar.errors import RefusedInput
from dvar.studio.draft import Draft
from dvar.studio.library import find_run, list_runs
from dvar.studio.new_run import Form, build_settings, check_new_run, estimate, list_models, preset_numbers, start
from dvar.studio.queue import read_request
from dvar.studio.run_files import IMAGES, SETTINGS
from dvar.training.methods.registry import METHODS

MODELS = {"mini": "mini", "mini-flow": "mini-flow"}
FORM = Form("my-mug", "textual-inversion", "mini", "<thing>", "mug", "", {})


@pytest.fixture
def mug() -> list[Path]:
    """The images of a bundled concept."""
    return sorted(mini.concepts()["red_striped_mug"].glob("*.png"))


def test_a_draft_holds_images_captions_and_form_in_its_folder(tmp_path: Path, mug: list[Path]) -> None:
    draft = Draft(tmp_path)
    assert draft.add(mug) == []
    assert [path.name for path in draft.images] == [path.name for path in mug]
    draft.write_caption("00.png", "a  <thing>\n in the snow ")
    draft.fill_captions(["a photo of <thing>", "my <thing>"])
    draft.write_form({"name": "x"})
    again = Draft(tmp_path)
    assert [again.caption(path) for path in again.images[:3]] == [
        "a <thing> in the snow",
        "my <thing>",
        "a photo of <thing>",
    ]
    assert again.read_form() == {"name": "x"}
    again.remove_image("00.png")
    again.write_caption("01.png", " ")
    assert "00.png" not in [path.name for path in again.images]
    assert not (again.images_folder / "00.txt").exists()
    assert not (again.images_folder / "01.txt").exists()


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("../../evil.png", "evil.png"),
        (".hidden.PNG", "hidden.png"),
        ("a b\n<c>.png", "a_b__c_.png"),
        ("x.txt", "x.image"),
    ],
)
def test_an_upload_gets_a_plain_name(tmp_path: Path, name: str, plain: str) -> None:
    upload = tmp_path / "upload"
    Image.new("RGB", (8, 8)).save(upload, "png")
    assert Draft(tmp_path)._free_name(name) == plain


def test_images_of_one_name_do_not_share_a_caption(tmp_path: Path, mug: list[Path]) -> None:
    draft = Draft(tmp_path)
    draft.add([mug[0], mug[0]])
    assert [path.name for path in draft.images] == ["00-2.png", "00.png"]


def test_a_name_from_the_browser_reaches_no_file_that_is_no_image_of_the_draft(tmp_path: Path, mug: list[Path]) -> None:
    draft, other = Draft(tmp_path), tmp_path / "other.png"
    draft.add(mug)
    other.write_bytes(b"mine")
    for name in ("../../../other.png", str(other)):
        draft.remove_image(name)
        draft.write_caption(name, "text")
    assert other.read_bytes() == b"mine"
    assert not list(tmp_path.glob("*.txt"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_the_form_shows_the_numbers_of_the_preset(method: str, model: str) -> None:
    config = configure({"pretrained_model_name_or_path": model}, METHODS[method].config_type)
    numbers = preset_numbers(method, model, MODELS)
    assert numbers["window"] == config.window
    assert numbers["max_train_steps"] == config.max_train_steps


def test_the_class_noun_goes_where_the_method_wants_it(tmp_path: Path) -> None:
    images = tmp_path / "images"
    inversion = build_settings(FORM, tmp_path, MODELS, images)
    custom = build_settings(replace(FORM, method="custom-diffusion"), tmp_path, MODELS, images)
    assert inversion["initializer_token"] == "mug"
    assert custom["class_noun"] == "mug"
    assert "initializer_token" not in custom


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "../evil"}, "a name has letters"),
        ({"name": ""}, "a name has letters"),
        ({"method": "full"}, "the method must be one of"),
        ({"model": "/etc"}, "the base model must be one of"),
        ({"model": "../models/x"}, "the base model must be one of"),
        ({"model": "./here"}, "the base model must be one of"),
    ],
)
def test_what_could_leave_the_folder_is_refused(tmp_path: Path, change: Mapping[str, Any], problem: str) -> None:
    with pytest.raises(RefusedInput, match=problem):
        build_settings(replace(FORM, **change), tmp_path, MODELS, tmp_path)


def test_the_models_of_a_folder_can_be_chosen_by_name(tmp_path: Path) -> None:
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd" / "model_index.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "one.safetensors").write_bytes(b"")
    models = list_models(tmp_path)
    assert list(models) == ["mini", "mini-flow", "one.safetensors", "sd"]
    assert models["sd"] == str(tmp_path / "sd")


def test_preflight_speaks_of_each_image_and_of_the_whole(tmp_path: Path, mug: list[Path]) -> None:
    draft, small = Draft(tmp_path), tmp_path / "small.png"
    Image.new("RGB", (20, 20)).save(small)
    (tmp_path / "broken.png").write_bytes(b"no image")
    draft.add([*mug, small, tmp_path / "broken.png"])
    check, config = check_new_run(replace(FORM, noun="", numbers={"window": 4}), tmp_path, MODELS)
    of_images = {row.name: row.problem for row in check.images if row.problem}
    assert of_images.keys() == {"small.png", "broken.png"}
    assert "must be 32 pixels or more" in of_images["small.png"]
    assert config is not None
    assert any("the class noun is missing" in problem for problem in check.problems)
    assert any("window must be" in problem for problem in check.problems)


def test_a_low_cap_scales_the_preset_as_in_a_shell_and_the_check_says_so(tmp_path: Path, mug: list[Path]) -> None:
    Draft(tmp_path).add(mug)
    check, config = check_new_run(replace(FORM, numbers={"max_train_steps": 60}), tmp_path, MODELS)
    assert check.problems == ()
    assert any("is scaled to 60: window" in remark for remark in check.remarks)
    assert config is not None
    assert config.window < 60


def test_an_empty_draft_is_asked_for_images_alone(tmp_path: Path) -> None:
    check, _ = check_new_run(FORM, tmp_path, MODELS)
    assert check.problems == ("the images are missing: drop three to five of the concept",)


def test_starting_moves_the_draft_into_the_folder_of_the_run(tmp_path: Path, mug: list[Path]) -> None:
    draft = Draft(tmp_path)
    draft.add(mug)
    draft.write_caption("00.png", "a <thing>")
    assert start(FORM, tmp_path, MODELS) == "my-mug"
    run = find_run(tmp_path, "my-mug")
    assert run.state == "queued"
    assert read_request(run)["method"] == "textual-inversion"
    assert (run.folder / IMAGES / "00.txt").read_text() == "a <thing>"
    assert f'instance_data_dir = "{run.folder / IMAGES}"' in (run.folder / SETTINGS).read_text()
    assert draft.images == []


def test_a_run_that_cannot_start_leaves_the_draft_where_it_is(tmp_path: Path, mug: list[Path]) -> None:
    Draft(tmp_path).add(mug)
    with pytest.raises(RefusedInput):
        start(replace(FORM, noun=""), tmp_path, MODELS)
    assert len(Draft(tmp_path).images) == len(mug)
    assert not (tmp_path / "my-mug").exists()


def test_a_name_that_is_taken_is_refused(tmp_path: Path, mug: list[Path]) -> None:
    write_run(tmp_path / "my-mug", generate_trace(steps=50), sampled_every=0)
    Draft(tmp_path).add(mug)
    with pytest.raises(RefusedInput, match="needs a folder of its own"):
        start(FORM, tmp_path, MODELS)


def test_the_name_of_a_run_that_waits_and_of_a_folder_of_runs_are_taken_too(tmp_path: Path, mug: list[Path]) -> None:
    Draft(tmp_path).add(mug)
    start(FORM, tmp_path, MODELS)
    write_run(tmp_path / "batch" / "dog", generate_trace(steps=50), sampled_every=0)
    for name in ("my-mug", "batch"):
        Draft(tmp_path).add(mug)
        check, config = check_new_run(replace(FORM, name=name), tmp_path, MODELS)
        taken = f"a new run needs a folder of its own, and {tmp_path / name} exists: give the run another name"
        assert check.problems == (taken,)
        assert config is not None
        with pytest.raises(RefusedInput, match="needs a folder of its own"):
            start(replace(FORM, name=name), tmp_path, MODELS)
    assert {run.name for run in list_runs(tmp_path)} == {"my-mug", "batch/dog"}


def test_time_and_memory_are_those_of_the_newest_run_of_its_kind(tmp_path: Path) -> None:
    settings = build_settings(FORM, tmp_path, MODELS, tmp_path)
    config = configure(settings, METHODS["textual-inversion"].config_type)
    assert estimate(config, tmp_path) is None
    same = {
        name: value
        for name, value in config.to_dict().items()
        if name not in ("max_train_steps", "window", "threshold")
    }
    trace = generate_trace(steps=100)
    write_run(tmp_path / "before", trace, finished=False, sampled_every=0, **same)
    write_run(tmp_path / "other", trace, finished=False, sampled_every=0, **same | {"resolution": 512})
    cost = estimate(config, tmp_path)
    assert cost is not None
    assert cost.like == "before"
    pace = (
        sum(float(trace.metric(f"seconds.{kind}")[1].sum()) for kind in ("train", "probe", "other")) / trace.last_step
    )
    assert cost.seconds == pytest.approx(pace * config.max_train_steps)
    assert cost.peak is None
