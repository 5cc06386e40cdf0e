"""What ships: a pipeline that stock diffusers loads and generates with, its figures, and the concepts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

import dvar.mini
from dvar import mini
from dvar.errors import RefusedInput
from dvar.mini import recogniser
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.concepts import held_out, reference_scenes
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import render

HOME = Path(dvar.mini.__file__).parent


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(mini.path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge() -> recogniser.Recogniser:
    return recogniser.load(HOME / "judges" / "recogniser.safetensors")


def test_stock_diffusers_loads_it_and_generates_what_is_prompted(
    pipeline: StableDiffusionPipeline, judge: recogniser.Recogniser
) -> None:
    places = ("night", "snow", "beach", "red wall")
    prompts = [f"a photo of a house {PLACES[place].words}" for place in places]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=20, generator=generators, output_type="np").images
    assert images.shape == (4, 64, 64, 3)
    with torch.no_grad():
        recognition = judge(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)
    assert [list(PLACES)[answer] for answer in recognition.best("place")] == list(places)
    assert [list(CLASSES)[answer] for answer in recognition.best("class")] == ["house"] * 4


def test_the_words_that_methods_start_from_are_one_token_each(pipeline: StableDiffusionPipeline) -> None:
    for word in ("a", "ktn", "pll", "ucd", *{subject.noun for subject in held_out().values()}):
        assert len(pipeline.tokenizer.tokenize(word)) == 1


def test_the_figures_beside_the_weights_were_measured_on_these_weights() -> None:
    digest = hashlib.sha256()
    for path in sorted([*(HOME / "model").rglob("*"), *(HOME / "judges").rglob("*")]):
        if path.is_file():
            digest.update(path.relative_to(HOME).as_posix().encode() + b"\0" + path.read_bytes())
    assert json.loads((HOME / "figures.json").read_text())["sha256"] == digest.hexdigest()
    assert digest.hexdigest() in (HOME / "README.md").read_text(encoding="utf-8")


def test_all_that_ships_is_small() -> None:
    def megabytes(folder: Path) -> float:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6

    assert megabytes(HOME / "model") <= 40
    assert megabytes(HOME / "judges") <= 15


def test_every_held_out_subject_ships_as_it_is_rendered() -> None:
    """The PNG files are what the world renders today: a changed class would leave concepts that no longer exist."""
    assert set(mini.concepts()) == set(held_out())
    assert list(mini.concepts())[-12:] == sorted(mini.TUNING)
    for name, folder in mini.concepts().items():
        paths = sorted(folder.glob("*.png"))
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
    with pytest.raises(RefusedInput, match="pip install dvar-mini"):
        mini.path()
    with pytest.raises(RefusedInput, match="pip install dvar-mini"):
        mini.concepts()
