"""Photographs on the bundled models: warned of before training, and no drawing is taken for one."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dvar import mini
from dvar.config.methods import TextualInversionConfig
from dvar.training.dataset import scan_concept
from dvar.training.photographs import is_photograph


def photograph(seed: int, size: int = 256) -> Image.Image:
    """An image as a camera makes one: light that falls off over a blurred scene, and noise of the sensor."""
    rng = np.random.default_rng(seed)
    scene = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    light = np.linspace(0.6, 1, size)[:, None, None]
    noisy = np.asarray(scene.filter(ImageFilter.GaussianBlur(4))) * light + rng.normal(0, 4, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def configure(folder: Path, **changes: str) -> TextualInversionConfig:
    settings = {"instance_data_dir": str(folder), "initializer_token": "mug", **changes}
    return TextualInversionConfig(resolution=64, output_dir=str(folder.parent / "run"), **settings)  # type: ignore[arg-type]


def test_photographs_are_warned_of_on_a_bundled_model_and_on_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(3):
        photograph(seed).save(folder / f"{seed}.jpg")
    for model in ("mini", "mini-flow"):
        with pytest.warns(UserWarning, match=f"images seems to hold photographs, and {model} knows nothing but a pict"):
            scan_concept(configure(folder, pretrained_model_name_or_path=model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan_concept(configure(folder, pretrained_model_name_or_path="owner/model"))


def test_no_bundled_concept_is_taken_for_photographs() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for folder in mini.concepts().values():
            scan_concept(configure(folder))


@pytest.mark.parametrize("size", [128, 512])
def test_no_rendering_of_the_bundled_world_is_taken_for_a_photograph(size: int) -> None:
    pytest.importorskip("skia")
    from dvar.mini.world import animals, household, outdoors  # noqa: F401  which register their classes
    from dvar.mini.world.concepts import held_out, reference_scenes
    from dvar.mini.world.scene import render

    for name, subject in list(held_out().items())[::6]:
        for scene in reference_scenes(name):
            assert not is_photograph(Image.fromarray(render(subject, scene, size))), name


def test_what_a_bundled_model_generates_is_never_taken_for_a_photograph() -> None:
    """It has 64 pixels, and no plain area."""
    assert is_photograph(photograph(0, size=128))
    assert not is_photograph(photograph(0, size=64))
