"""Sampling images, and writing them to a folder."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.diffusion.backbones.stable_diffusion_xl import StableDiffusionXL
from dvar.diffusion.sampling import BATCH, Abandoned, batch_size, sample, sample_into
from dvar.testing import tiny_xl_pipeline


def equal_pixels(first: Any, second: Any) -> bool:
    """Return whether two images have the same pixels."""
    return np.array_equal(np.asarray(first), np.asarray(second))


def test_images_are_those_of_the_stock_pipeline(tiny_model: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (11, 12)]
    prompts = ["a photo of mug", "a dark cat"]
    expected_images = stock(
        prompts, generator=seeds, height=32, width=32, num_inference_steps=3, guidance_scale=4.0
    ).images
    images = sample(StableDiffusion.load(tiny_model, device="cpu"), prompts, [11, 12], size=32, steps=3, guidance=4.0)
    for image, expected_image in zip(images, expected_images, strict=True):
        assert equal_pixels(image, expected_image)
    assert not equal_pixels(*images)


def test_another_scheduler_generates_the_image_of_a_stock_pipeline(tiny_model: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DPMSolverMultistepScheduler.from_config(stock.scheduler.config)
    expected = stock("a mug", generator=torch.Generator().manual_seed(1), height=32, width=32, num_inference_steps=3)
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    options: dict[str, Any] = {"size": 32, "steps": 3}
    (image,) = sample(backbone, ["a mug"], [1], **options, scheduler="DPMSolverMultistepScheduler")
    assert equal_pixels(image, expected.images[0])
    assert not equal_pixels(image, sample(backbone, ["a mug"], [1], **options)[0])


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_latents_are_decoded_in_float32(tiny_model: Path, precision: str) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu", mixed_precision=precision)
    seen: list[tuple[torch.dtype, bool]] = []
    first, original = backbone.vae.decoder.conv_in, backbone.vae.decode

    def look(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))

    handle = first.register_forward_hook(look)
    sample(backbone, ["a mug"], [1], size=32, steps=1)
    handle.remove()
    assert seen == [(torch.float32, False)]
    assert backbone.vae.decode == original, "the model is left as it was"


def test_sampling_restores_all_state(tiny_model: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    expected = sample(backbone, ["a mug"], [0], size=32, steps=2)[0]
    for part in backbone.text_encoder.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    backbone.text_encoder.train()
    backbone.denoiser.mid_block.train()
    flags = [part.training for network in backbone.modules for part in network.modules()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    numbers = random.random(), np.random.random(), torch.rand(1)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    timesteps = backbone.scheduler.timesteps.clone()
    image = sample(backbone, ["a mug"], [0], size=32, steps=2)[0]
    assert equal_pixels(image, expected)
    assert (random.random(), np.random.random(), torch.rand(1)) == numbers
    assert [part.training for network in backbone.modules for part in network.modules()] == flags
    assert torch.equal(backbone.scheduler.timesteps, timesteps)
    assert all(weight.grad is None for network in backbone.modules for weight in network.parameters())


def test_more_prompts_than_a_batch_are_sampled_in_batches(tiny_model: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    images = sample(backbone, ["a mug"] * (BATCH + 1), list(range(BATCH + 1)), size=32, steps=1)
    assert len(images) == BATCH + 1
    image = sample(backbone, ["a mug"], [BATCH], size=32, steps=1)[0]
    assert equal_pixels(images[-1], image)


@pytest.mark.parametrize(("size", "images"), [(64, 8), (256, 8), (512, 4), (768, 1), (1024, 1), (2048, 1)])
def test_a_batch_is_as_large_as_a_decoder_can_take(size: int, images: int) -> None:
    assert batch_size(size) == images


def test_a_prompt_without_a_negative_one_is_sampled_as_if_alone(tmp_path: Path) -> None:
    """An empty negative prompt is none to this pipeline: it would be encoded, where none is zeros."""
    backbone = StableDiffusionXL.load(tiny_xl_pipeline(tmp_path / "model"), device="cpu")
    options: dict[str, Any] = {"size": 32, "steps": 2, "guidance": 6.0}
    prompts, seeds = ["a mug", "a mug", "a cat"], [3, 3, 4]
    images = sample(backbone, prompts, seeds, negatives=[None, "dark", None], **options)
    for index in (0, 2):
        assert equal_pixels(images[index], sample(backbone, prompts[index : index + 1], [seeds[index]], **options)[0])
    assert not equal_pixels(images[0], images[1])
    assert not equal_pixels(images[0], sample(backbone, ["a mug"], [3], negatives=[""], **options)[0])


def test_a_folder_holds_all_of_its_images_or_does_not_exist(tiny_model: Path, tmp_path: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    folder, prompts = tmp_path / "samples" / "step-0", ["a mug"] * 2
    save = Image.Image.save
    saved_paths: list[Path] = []

    def save_once(self: Image.Image, path: Path) -> None:
        if saved_paths:
            raise OSError("disk full")
        saved_paths.append(path)
        save(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", save_once)
        with pytest.raises(OSError, match="disk full"):
            sample_into(folder, backbone, prompts, [0, 1], size=32, steps=1)
    assert saved_paths
    assert not folder.exists()
    paths = sample_into(folder, backbone, prompts, [0, 1], size=32, steps=1)
    assert [path.name for path in paths] == ["00.png", "01.png"]
    assert [path.name for path in folder.parent.iterdir()] == ["step-0"]
    for path, expected in zip(paths, sample(backbone, prompts, [0, 1], size=32, steps=1), strict=True):
        assert equal_pixels(Image.open(path), expected)


def test_a_folder_of_images_is_generated_once_and_read_in_prompt_order(tiny_model: Path, tmp_path: Path) -> None:
    backbone = StableDiffusion.load(tiny_model, device="cpu")
    paths = sample_into(tmp_path / "samples", backbone, ["a mug"] * 101, range(101), size=32, steps=1)
    assert [path.name for path in paths] == [f"{index:03d}.png" for index in range(101)]
    assert sample_into(tmp_path / "samples", backbone, ["a cat"], [7], size=32, steps=1) == paths


def test_an_interrupted_sampling_ends_between_two_steps_and_leaves_no_image(tiny_model: Path, tmp_path: Path) -> None:
    backbone, answers = StableDiffusion.load(tiny_model, device="cpu"), iter([False, False, True])
    with pytest.raises(Abandoned):
        sample_into(tmp_path / "samples", backbone, ["a mug"], [0], size=32, steps=5, interrupted=lambda: next(answers))
    assert not (tmp_path / "samples").exists()
    with pytest.raises(StopIteration):
        next(answers)
