"""The rescaling augmentation of Custom Diffusion: images, captions and masks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.objective import draw
from dvar.diffusion.randomness import seed_for
from dvar.training.augmentation import encode_rescaled_examples, rescale
from dvar.training.placeholder_tokens import FAR, NEAR

SIZE = 64


def make_choice(key: int) -> Any:
    return lambda factor, count: seed_for(key, factor) % count


def plain_image(colour: tuple[int, int, int], size: int = SIZE) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@given(st.integers(0, 10**9))
def test_an_image_is_shrunk_on_grey_or_enlarged_and_cropped_or_unchanged(key: int) -> None:
    source = plain_image((250, 10, 10))
    image, prefix, (left, top, side) = rescale(source, make_choice(key))
    pixels = np.asarray(image)
    assert pixels.shape == (SIZE, SIZE, 3)
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[top : top + side, left : left + side] = True
    assert (pixels[inside] == (250, 10, 10)).all()
    assert (pixels[~inside] == 128).all()
    assert (prefix in FAR) == (side < SIZE)
    assert side == SIZE or SIZE / 3 - 1 < side < 0.6 * SIZE
    if prefix not in FAR:
        assert prefix in ("", *NEAR)
        assert (left, top, side) == (0, 0, SIZE)


def test_scales_are_uniform_and_one_image_in_three_is_enlarged() -> None:
    counts = Counter(rescale(plain_image((0, 0, 0)), make_choice(key))[1] for key in range(6000))
    # Of two thirds of all, even between 1/3 and 1, those under 0.6 are (0.6 - 1/3) / (2/3) = 0.4; six deviations.
    for prefixes, chance in ((FAR, 2 / 3 * 0.4), (NEAR, 1 / 3), (("",), 2 / 3 * 0.6)):
        count = sum(counts[prefix] for prefix in prefixes)
        assert abs(count - 6000 * chance) < 6 * (6000 * chance * (1 - chance)) ** 0.5
        assert all(counts[prefix] > count / len(prefixes) * 0.8 for prefix in prefixes)


def test_an_enlarged_image_is_cropped_at_any_position() -> None:
    ramp = Image.fromarray(np.tile(np.arange(SIZE, dtype=np.uint8)[:, None] * 4, (1, SIZE))).convert("RGB")
    spans, tops = [], []
    for key in range(300):
        image, prefix, _ = rescale(ramp, make_choice(key))
        if prefix in NEAR:
            column = np.asarray(image)[:, 0, 0].astype(int)
            spans.append((column[-1] - column[0]) / (4 * (SIZE - 1)))
            tops.append(column[0])
    assert all(1 / 1.4 - 0.05 < span < 1 / 1.2 + 0.05 for span in spans)
    assert min(tops) < 10
    assert max(tops) > 4 * SIZE * (1 - 1 / 1.3) - 10


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(tiny_model, device="cpu")


def test_an_example_is_the_encoded_image_its_caption_and_a_mask_without_the_grey_border(backbone: Backbone) -> None:
    images, texts = [plain_image((200, 30, 30), 96), plain_image((30, 30, 200), 96)], ["a photo of mug", "a red mug"]
    small = 0
    examples = encode_rescaled_examples(images, [[text] for text in texts], backbone, mirrored=False)
    for key in range(60):
        choose = make_choice(key)
        index = choose("picture", 2)
        image, prefix, (left, top, side) = rescale(images[index], choose)
        example = examples.example(choose)
        assert torch.equal(example.moments, backbone.encode([image])[0])
        assert torch.equal(example.input_ids, backbone.tokenize([prefix + texts[index]])[0])
        assert example.mask is not None
        assert example.mask.shape == (1, 24, 24)
        filled = example.mask[0].repeat_interleave(4, 0).repeat_interleave(4, 1).bool().numpy()
        grey = np.asarray(image)[..., 0] == 128
        assert filled.any()
        if side == 96:
            assert filled.all()
            continue
        small += 1
        rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        for start, cells in ((top, rows), (left, columns)):  # the cell at an edge of the image is masked out
            assert (cells[0] - start in range(1, 5)) if start else cells[0] == 0
            assert (start + side - 1 - cells[-1] in range(1, 5)) if start + side < 96 else cells[-1] == 95
        assert not (filled & grey).any()
    assert small > 10


def test_no_image_is_mirrored_without_mirroring_and_half_are_with_it(backbone: Backbone) -> None:
    half = Image.new("RGB", (32, 32), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    flags: list[bool] = []

    class Eye:
        def encode(self, images: list[Image.Image]) -> torch.Tensor:
            values = np.asarray(images[0], dtype=int)[..., 0]
            flags.append(bool(values[:, :16].sum() < values[:, 16:].sum()))
            return torch.zeros(1, 8, 8, 8)

        def tokenize(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 3, dtype=torch.long)

    for mirrored, least, most in ((False, 0.0, 0.4), (True, 0.3, 0.7)):
        flags.clear()
        examples = encode_rescaled_examples([half], [["a mug"]], Eye(), mirrored=mirrored)  # type: ignore[arg-type]
        for key in range(200):
            examples.example(make_choice(key))
        originals = [rescale(half, make_choice(key))[0] for key in range(200)]
        mirror_count = sum(
            flag != bool(np.asarray(image, dtype=int)[:, :16].sum() < np.asarray(image, dtype=int)[:, 16:].sum())
            for flag, image in zip(flags, originals, strict=True)
        )
        assert least <= mirror_count / 200 <= (0.0 if not mirrored else most)


def test_draws_do_not_depend_on_how_a_step_is_split(backbone: Backbone) -> None:
    examples = encode_rescaled_examples(
        [plain_image((9, 9, 9), 32), plain_image((90, 9, 9), 32)], [["a mug"], ["a cat"]], backbone, mirrored=True
    )
    batch = draw(examples, timesteps=10, seed=3, stream="train", step=5, count=6)
    parts = [draw(examples, timesteps=10, seed=3, stream="train", step=5, first=first, count=3) for first in (0, 3)]
    union = parts[0].joined(parts[1])
    for name in ("moments", "input_ids", "mask", "noise"):
        assert torch.equal(getattr(batch, name), getattr(union, name))
    next_batch = draw(examples, timesteps=10, seed=3, stream="train", step=6, count=6)
    assert not torch.equal(batch.moments, next_batch.moments)
