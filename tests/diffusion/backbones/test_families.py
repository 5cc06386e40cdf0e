"""Every family against stock diffusers: its images, the condition of its network, its noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.backbones.stock import StockBackbone
from dvar.diffusion.objective import Encoded, denoising_loss, draw, latents_of
from dvar.diffusion.sampling import sample
from dvar.errors import ModelError
from dvar.testing import tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

FAMILIES: dict[str, Callable[..., Path]] = {
    "StableDiffusionPipeline": tiny_pipeline,
    "StableDiffusionXLPipeline": tiny_xl_pipeline,
    "StableDiffusion3Pipeline": tiny_sd3_pipeline,
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp("family") / "model")


@pytest.fixture
def backbone(folder: Path) -> StockBackbone:
    loaded = load_backbone(folder, device="cpu")
    assert isinstance(loaded, StockBackbone)
    return loaded


def load_stock(folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if (folder / "transformer").exists() else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_everything_is_frozen_and_every_weight_is_in_the_digest(folder: Path, backbone: StockBackbone) -> None:
    for network in backbone.modules:
        assert not any(weight.requires_grad for weight in network.parameters())
        assert not any(part.training for part in network.modules())
    changed = load_backbone(folder, device="cpu")
    assert changed.digest == backbone.digest
    assert len(backbone.modules) == 2 + len(backbone.towers)


def test_an_image_is_the_stock_pipelines_bit_for_bit(folder: Path, backbone: StockBackbone) -> None:
    """Generate with two prompts at guidance, so that the condition of every text encoder is in it."""
    prompts = ["a photo of mug", "a dark cat"]
    ours = sample(backbone, prompts, [3, 4], size=32, steps=3, guidance=4.0)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    stock = load_stock(folder)
    theirs = stock(prompts, generator=generators, height=32, width=32, num_inference_steps=3, guidance_scale=4.0).images
    assert [image.tobytes() for image in ours] == [image.tobytes() for image in theirs]


def test_the_prediction_has_the_condition_that_the_stock_pipeline_passes(
    folder: Path, backbone: StockBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Record what the stock pipeline sends to its network, and send the same latents and time through ours."""
    stock, calls = load_stock(folder), []
    network = getattr(stock, backbone.denoiser_name)
    forward = network.forward

    def recorded(*inputs: Any, **named: Any) -> Any:
        output = forward(*inputs, **named)
        calls.append((inputs, named, output[0]))
        return output

    monkeypatch.setattr(network, "forward", recorded)
    prompt = "a photo of mug on the beach"
    stock(prompt, height=32, width=32, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    inputs, named, expected = calls[0]
    noisy, time = [*inputs, *(named[name] for name in ("hidden_states", "timestep") if name in named)][:2]
    with torch.no_grad():
        ours = backbone.predict(noisy, time.reshape(1).to(noisy.device), backbone.tokenize([prompt]))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_the_prompt_of_every_text_encoder_matters(backbone: StockBackbone) -> None:
    noisy, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), backbone.schedule.times[[500]]
    ids = backbone.tokenize(["a photo of mug"])
    first = 0
    with torch.no_grad():
        base = backbone.predict(noisy, times, ids)
        for tower in backbone.towers:
            changed = ids.clone()
            changed[0, first + 2] = ids[0, first + 4]
            assert not torch.equal(backbone.predict(noisy, times, changed), base), tower.name
            first += tower.length


def test_the_noise_is_that_of_the_models_own_scheduler(folder: Path, backbone: StockBackbone) -> None:
    scheduler = load_stock(folder).scheduler
    examples = Encoded(torch.randn(2, 1, 8, 8, 8), [backbone.tokenize(["a mug"])] * 2)
    schedule = backbone.schedule
    draws = draw(examples, timesteps=len(schedule), seed=0, stream="train", count=6, density=schedule.density)
    latents = latents_of(draws, schedule.scaling_factor, schedule.shift_factor)
    seen: list[torch.Tensor] = []

    def predict(noisy: torch.Tensor, times: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        seen.extend((noisy, times))
        return torch.zeros_like(noisy)

    losses = denoising_loss(predict, draws, schedule)
    if schedule.prediction_type == "flow":
        expected = scheduler.scale_noise(latents, seen[1], draws.noise)
        target = draws.noise - latents
    else:
        reference = diffusers.DDPMScheduler.from_config(scheduler.config)
        expected, target = reference.add_noise(latents, draws.noise, draws.timesteps), draws.noise
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses, target.square().mean(dim=(1, 2, 3)))


def test_timesteps_of_flow_matching_are_logit_normal() -> None:
    examples = Encoded(torch.randn(1, 1, 8, 2, 2), [torch.zeros(1, 4, dtype=torch.int64)])
    draws = draw(examples, timesteps=1000, seed=1, stream="train", count=4000, density="logit-normal")
    # The quartiles of the sigmoid of a standard Gaussian are sigmoid(-0.6745), 0.5 and sigmoid(0.6745).
    quartiles = torch.quantile(draws.timesteps.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, torch.tensor([337.5, 500.0, 662.5], dtype=torch.float64), rtol=0, atol=20)


def test_moments_of_an_image_do_not_depend_on_its_batch(backbone: StockBackbone) -> None:
    images = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    assert torch.equal(backbone.encode(images)[1:2], backbone.encode(images[1:2]))


@pytest.mark.parametrize("family", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_a_model_that_lacks_a_text_encoder_is_refused(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family](tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_2": [None, None], "tokenizer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ModelError, match="text_encoder_2"):
        load_backbone(folder, device="cpu")
