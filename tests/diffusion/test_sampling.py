from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from dvar.diffusion.sampling import BATCH, Abandoned, sample, sample_into
from dvar.diffusion.stable_diffusion import StableDiffusion


def same(one: Any, other: Any) -> bool:
    """Whether two images have the same pixels."""
    return np.array_equal(np.asarray(one), np.asarray(other))


def test_pictures_are_those_of_the_stock_pipeline(tiny_model: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    prompts = ["a photo of mug", "a dark cat"]
    expected = stock(prompts, generator=seeds, height=32, width=32, num_inference_steps=3, guidance_scale=4.0).images
    drawn = sample(StableDiffusion.load(tiny_model, device="cpu"), prompts, [11, 12], size=32, steps=3, guidance=4.0)
    for ours, theirs in zip(drawn, expected, strict=True):
        assert same(ours, theirs)
    assert not same(*drawn)


def test_another_scheduler_draws_as_a_stock_pipeline_with_it_does(tiny_model: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    expected = stock("a mug", generator=torch.Generator().manual_seed(1), height=32, width=32, num_inference_steps=3)
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    how: dict[str, Any] = {"size": 32, "steps": 3}
    (drawn,) = sample(backbone, ["a mug"], [1], **how, scheduler="DPMSolverMultistepScheduler")
    assert same(drawn, expected.images[0])
    assert not same(drawn, sample(backbone, ["a mug"], [1], **how)[0])


def test_sampling_leaves_no_trace(tiny_model: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    expected = sample(backbone, ["a mug"], [0], size=32, steps=2)[0]
    for part in backbone.text_encoder.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    backbone.text_encoder.train()
    backbone.unet.mid_block.train()
    flags = [part.training for network in backbone.modules for part in network.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    drawn = random.random(), np.random.random(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    timesteps = backbone.scheduler.timesteps.clone()
    picture = sample(backbone, ["a mug"], [0], size=32, steps=2)[0]
    assert same(picture, expected)
    assert (random.random(), np.random.random(), torch.rand(1)) == drawn
    assert [part.training for network in backbone.modules for part in network.modules()] == flags
    assert torch.equal(backbone.scheduler.timesteps, timesteps)
    assert all(weight.grad is None for network in backbone.modules for weight in network.parameters())


def test_more_prompts_than_a_batch(tiny_model: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    drawn = sample(backbone, ["a mug"] * (BATCH + 1), list(range(BATCH + 1)), size=32, steps=1)
    assert len(drawn) == BATCH + 1
    alone = sample(backbone, ["a mug"], [BATCH], size=32, steps=1)[0]
    assert same(drawn[-1], alone)


def test_a_folder_holds_all_of_its_pictures_or_is_not_there(tiny_model: Path, tmp_path: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    folder, prompts = tmp_path / "samples" / "step-0", ["a mug"] * 2
    save = Image.Image.save
    saved: list[Path] = []

    def full_disk(self: Image.Image, path: Path) -> None:
        if saved:
            raise OSError("disk full")
        saved.append(path)
        save(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(OSError, match="disk full"):
            sample_into(folder, backbone, prompts, [0, 1], size=32, steps=1)
    assert saved
    assert not folder.exists()
    paths = sample_into(folder, backbone, prompts, [0, 1], size=32, steps=1)
    assert [path.name for path in paths] == ["00.png", "01.png"]
    assert [path.name for path in folder.parent.iterdir()] == ["step-0"]
    for path, expected in zip(paths, sample(backbone, prompts, [0, 1], size=32, steps=1), strict=True):
        assert same(Image.open(path), expected)


def test_a_folder_of_pictures_is_drawn_once_and_read_in_the_order_of_its_prompts(
    tiny_model: Path, tmp_path: Path
) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    paths = sample_into(tmp_path / "many", backbone, ["a mug"] * 101, range(101), size=32, steps=1)
    assert [path.name for path in paths] == [f"{index:03d}.png" for index in range(101)]
    assert sample_into(tmp_path / "many", backbone, ["a cat"], [7], size=32, steps=1) == paths


def test_drawing_ends_between_two_steps_when_asked_to_and_leaves_no_picture(tiny_model: Path, tmp_path: Path) -> None:
    backbone, asked = StableDiffusion.load(tiny_model, device="cpu"), iter([False, False, True])
    with pytest.raises(Abandoned):
        sample_into(tmp_path / "drawn", backbone, ["a mug"], [0], size=32, steps=5, interrupted=lambda: next(asked))
    assert not (tmp_path / "drawn").exists()
    with pytest.raises(StopIteration):
        next(asked)
