"""The rescaling augmentation of Custom Diffusion: how pictures are shown, what captions say, what the loss sees."""

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


def chooser(key: int) -> Any:
    return lambda factor, count: seed_for(key, factor) % count


def flat(colour: tuple[int, int, int], size: int = SIZE) -> Image.Image:
    return Image.new("RGB", (size, size), colour)


@given(st.integers(0, 10**9))
def test_a_picture_is_whole_on_grey_or_a_part_of_itself_or_as_it_is(key: int) -> None:
    picture = flat((250, 10, 10))
    shown, words, (left, top, side) = rescale(picture, chooser(key))
    pixels = np.asarray(shown)
    assert pixels.shape == (SIZE, SIZE, 3)
    inside = np.zeros((SIZE, SIZE), dtype=bool)
    inside[top : top + side, left : left + side] = True
    assert (pixels[inside] == (250, 10, 10)).all()
    assert (pixels[~inside] == 128).all()
    assert (words in FAR) == (side < SIZE)
    assert side == SIZE or SIZE / 3 - 1 < side < 0.6 * SIZE
    if words not in FAR:
        assert words in ("", *NEAR)
        assert (left, top, side) == (0, 0, SIZE)


def test_sizes_are_even_and_one_time_in_three_larger() -> None:
    seen = Counter(rescale(flat((0, 0, 0)), chooser(key))[1] for key in range(6000))
    # Of two thirds of all, even between 1/3 and 1, those under 0.6 are (0.6 - 1/3) / (2/3) = 0.4; six deviations.
    for words, chance in ((FAR, 2 / 3 * 0.4), (NEAR, 1 / 3), (("",), 2 / 3 * 0.6)):
        count = sum(seen[word] for word in words)
        assert abs(count - 6000 * chance) < 6 * (6000 * chance * (1 - chance)) ** 0.5
        assert all(seen[word] > count / len(words) * 0.8 for word in words)


def test_a_larger_picture_is_cut_from_anywhere_in_it() -> None:
    ramp = Image.fromarray(np.tile(np.arange(SIZE, dtype=np.uint8)[:, None] * 4, (1, SIZE))).convert("RGB")
    spans, tops = [], []
    for key in range(300):
        shown, words, _ = rescale(ramp, chooser(key))
        if words in NEAR:
            column = np.asarray(shown)[:, 0, 0].astype(int)
            spans.append((column[-1] - column[0]) / (4 * (SIZE - 1)))
            tops.append(column[0])
    assert all(1 / 1.4 - 0.05 < span < 1 / 1.2 + 0.05 for span in spans)
    assert min(tops) < 10
    assert max(tops) > 4 * SIZE * (1 - 1 / 1.3) - 10


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(tiny_model, device="cpu")


def test_an_example_is_the_encoded_picture_its_caption_and_the_cells_away_from_grey(backbone: Backbone) -> None:
    pictures, texts = [flat((200, 30, 30), 96), flat((30, 30, 200), 96)], ["a photo of mug", "a red mug"]
    small = 0
    examples = encode_rescaled_examples(pictures, [[text] for text in texts], backbone, mirrored=False)
    for key in range(60):
        choose = chooser(key)
        index = choose("picture", 2)
        shown, words, (left, top, side) = rescale(pictures[index], choose)
        example = examples.example(choose)
        assert torch.equal(example.moments, backbone.encode([shown])[0])
        assert torch.equal(example.input_ids, backbone.tokenize([words + texts[index]])[0])
        assert example.mask is not None
        assert example.mask.shape == (1, 24, 24)
        filled = example.mask[0].repeat_interleave(4, 0).repeat_interleave(4, 1).bool().numpy()
        grey = np.asarray(shown)[..., 0] == 128
        assert filled.any()
        if side == 96:
            assert filled.all()
            continue
        small += 1
        rows, columns = np.flatnonzero(filled.any(1)), np.flatnonzero(filled.any(0))
        for start, found in ((top, rows), (left, columns)):  # the cell at an edge of the picture is left out
            assert (found[0] - start in range(1, 5)) if start else found[0] == 0
            assert (start + side - 1 - found[-1] in range(1, 5)) if start + side < 96 else found[-1] == 95
        assert not (filled & grey).any()
    assert small > 10


def test_without_mirroring_no_picture_is_mirrored_and_with_it_half_are(backbone: Backbone) -> None:
    half = Image.new("RGB", (32, 32), (0, 0, 0))
    half.paste((255, 255, 255), (0, 0, 16, 32))
    seen: list[bool] = []

    class Eye:
        def encode(self, pictures: list[Image.Image]) -> torch.Tensor:
            values = np.asarray(pictures[0], dtype=int)[..., 0]
            seen.append(bool(values[:, :16].sum() < values[:, 16:].sum()))
            return torch.zeros(1, 8, 8, 8)

        def tokenize(self, texts: list[str]) -> torch.Tensor:
            return torch.zeros(len(texts), 3, dtype=torch.long)

    for mirrored, least, most in ((False, 0.0, 0.4), (True, 0.3, 0.7)):
        seen.clear()
        examples = encode_rescaled_examples([half], [["a mug"]], Eye(), mirrored=mirrored)  # type: ignore[arg-type]
        for key in range(200):
            examples.example(chooser(key))
        plain = [rescale(half, chooser(key))[0] for key in range(200)]
        turned = sum(
            flag != bool(np.asarray(shown, dtype=int)[:, :16].sum() < np.asarray(shown, dtype=int)[:, 16:].sum())
            for flag, shown in zip(seen, plain, strict=True)
        )
        assert least <= turned / 200 <= (0.0 if not mirrored else most)


def test_what_is_drawn_from_it_does_not_depend_on_how_a_step_is_split(backbone: Backbone) -> None:
    examples = encode_rescaled_examples(
        [flat((9, 9, 9), 32), flat((90, 9, 9), 32)], [["a mug"], ["a cat"]], backbone, mirrored=True
    )
    whole = draw(examples, timesteps=10, seed=3, stream="train", step=5, count=6)
    parts = [draw(examples, timesteps=10, seed=3, stream="train", step=5, first=at, count=3) for at in (0, 3)]
    joined = parts[0].joined(parts[1])
    for name in ("moments", "input_ids", "mask", "noise"):
        assert torch.equal(getattr(whole, name), getattr(joined, name))
    other = draw(examples, timesteps=10, seed=3, stream="train", step=6, count=6)
    assert not torch.equal(whole.moments, other.moments)
