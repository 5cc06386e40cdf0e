"""The tiny pipeline is part of the product: others test against it too."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from dvar.testing import WORDS, tiny_concept, tiny_pipeline, tiny_tokenizer


@pytest.mark.parametrize("resolution", [32, 64])
def test_stock_diffusers_loads_it_and_its_pictures_follow_the_prompt(tmp_path: Path, resolution: int) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_pipeline(tmp_path / "model", resolution=resolution), safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(0) for _ in range(2)]
    pictures = pipeline(["a red mug", "a dark cat"], generator=seeds, num_inference_steps=2).images
    assert [picture.size for picture in pictures] == [(resolution, resolution)] * 2
    assert not np.array_equal(*pictures)


def test_the_same_arguments_give_the_same_files(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    digests = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        folder = tiny_pipeline(tmp_path / name, seed=seed)
        weights = sorted(folder.rglob("*.safetensors"))
        digests.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in weights])
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_each_of_its_words_is_one_token_and_any_text_can_be_spelled() -> None:
    tokenizer = tiny_tokenizer()
    for word in WORDS:
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    for text in ("mugs", "naïve 東京 <x>", "a1b2"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.unk_token_id not in ids
        assert len(ids) > 1


def test_its_pictures_show_one_subject_in_several_places(tmp_path: Path) -> None:
    folder = tiny_concept(tmp_path / "ball", pictures=5, size=48)
    pictures = [Image.open(path) for path in sorted(folder.iterdir())]
    assert [(picture.size, picture.mode) for picture in pictures] == [((48, 48), "RGB")] * 5
    assert len({picture.tobytes() for picture in pictures}) == 5
