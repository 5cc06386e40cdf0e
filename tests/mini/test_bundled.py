"""What ships: a pipeline that stock diffusers loads and generates with, its figures, and the concepts."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPTokenizer

import dvar.mini
from dvar import mini
from dvar.errors import RefusedInput
from dvar.mini import recogniser
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.concepts import held_out, reference_scenes
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import render
from pretraining.evaluate import folder_hash
from pretraining.ship import save_vocabulary

HOME = Path(dvar.mini.__file__).parent


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(mini.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge() -> recogniser.Recogniser:
    return recogniser.load(HOME / "judges" / "recogniser.safetensors")


@pytest.fixture(scope="module")
def flow() -> StableDiffusion3Pipeline:
    """The second model, as stock diffusers loads it without T5, which it does not have."""
    pipe = StableDiffusion3Pipeline.from_pretrained(mini.path("mini-flow"), text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["pipeline", "flow"])
def test_stock_diffusers_loads_it_and_generates_what_is_prompted(
    name: str, request: pytest.FixtureRequest, judge: recogniser.Recogniser
) -> None:
    places = ("night", "snow", "beach", "red wall")
    prompts = [f"a photo of a house {PLACES[place].words}" for place in places]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    size = {"height": 64, "width": 64}
    pipe = request.getfixturevalue(name)
    images = pipe(prompts, num_inference_steps=20, generator=generators, output_type="np", **size).images
    assert images.shape == (4, 64, 64, 3)
    with torch.no_grad():
        recognition = judge(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    assert [list(PLACES)[answer] for answer in recognition.best("place")] == list(places)
    assert [list(CLASSES)[answer] for answer in recognition.best("class")] == ["house"] * 4


def test_the_words_that_methods_start_from_are_one_token_each(pipeline: StableDiffusionPipeline) -> None:
    for word in ("a", "ktn", "pll", "ucd", *{subject.noun for subject in held_out().values()}):
        assert len(pipeline.tokenizer.tokenize(word)) == 1


def test_a_program_that_reads_vocabulary_and_merges_has_the_same_tokenizer(tmp_path: Path) -> None:
    folder = HOME / "model" / "tokenizer"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    texts = [
        *(f"a rendering of a {subject.noun}" for subject in held_out().values()),
        "a photo of red_striped_mug, upside-down!",
        "Zürich 42",
    ]
    whole, parts = CLIPTokenizer.from_pretrained(folder), CLIPTokenizer.from_pretrained(tmp_path)
    assert [parts(text).input_ids for text in texts] == [whole(text).input_ids for text in texts]
    shutil.copytree(folder, tmp_path / "again")
    save_vocabulary(tmp_path / "again")
    assert all((tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes() for name in os.listdir(folder))


def test_the_figures_beside_the_weights_were_measured_on_these_weights() -> None:
    figures, page = json.loads((HOME / "figures.json").read_text()), (HOME / "README.md").read_text(encoding="utf-8")
    assert figures["sha256"] == folder_hash(HOME)
    assert figures["flow"]["sha256"] == folder_hash(HOME, ("flow",))
    assert figures["sha256"] in page
    assert figures["flow"]["sha256"] in page


def test_no_config_names_the_folder_that_a_model_was_made_in() -> None:
    configs = sorted(path for part in ("model", "flow", "judges") for path in (HOME / part).rglob("*.json"))
    assert configs
    assert not [path for path in configs if json.loads(path.read_text(encoding="utf-8")).get("_name_or_path")]


def test_all_that_ships_is_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    assert megabytes(HOME / "model") <= 40
    assert megabytes(HOME / "flow") <= 22
    assert megabytes(HOME / "judges") <= 15


def test_every_held_out_subject_ships_as_it_is_rendered() -> None:
    """The PNG files are what the world renders today: a changed class would leave concepts that no longer exist."""
    assert set(mini.concepts()) == set(held_out())
    assert list(mini.concepts())[-12:] == sorted(mini.TUNING)
    for name, folder in mini.concepts().items():
        paths = sorted(folder.iterdir())  # nothing but images, so that any script can read the folder
        assert 3 <= len(paths) <= 5
        assert mini.noun(name) == held_out()[name].noun
        for path, scene in zip(paths, reference_scenes(name), strict=True):
            assert np.array_equal(np.asarray(Image.open(path)), render(held_out()[name], scene))


def test_the_recogniser_reads_the_classes_of_the_concepts(judge: recogniser.Recogniser) -> None:
    images = [Image.open(path) for folder in mini.concepts().values() for path in sorted(folder.glob("*.png"))]
    nouns = [held_out()[name].noun for name, folder in mini.concepts().items() for _ in folder.glob("*.png")]
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        best = judge(pixels.float() / 127.5 - 1).best("class").tolist()
    right = np.mean([list(CLASSES)[answer] == noun for answer, noun in zip(best, nouns, strict=True)])
    assert right > 0.9


def test_without_the_weights_the_message_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mini, "_HERE", tmp_path)
    with pytest.raises(RefusedInput, match="the bundled model is not installed: pip install dvar-mini"):
        mini.path()
    with pytest.raises(RefusedInput, match="the bundled model mini-flow is not installed: pip install dvar-mini"):
        mini.path("mini-flow")
    with pytest.raises(RefusedInput, match="pip install dvar-mini"):
        mini.concepts()
