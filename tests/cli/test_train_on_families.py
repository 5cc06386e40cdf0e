"""The command that trains LoRA, on the folder of each family of base models, in its default precision."""

from __future__ import annotations

import json
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from command_line import dvar

from dvar.diffusion.families import BACKBONES
from dvar.diffusion.sampling import sample
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import BackboneContract
from dvar.testing.model_card import run_model_card

PROMPT = "a photo of mug"


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        families.StableDiffusionFamily,
        families.LatentDiffusionFamily,
        families.StableDiffusionXLFamily,
        families.StableDiffusion3Family,
        families.StableDiffusion3WithT5Family,
        families.FluxFamily,
        families.Flux2KleinFamily,
        families.ZImageFamily,
        families.QwenImageFamily,
    ],
)
def test_the_command_stops_by_its_rule_and_stock_diffusers_loads_what_it_learned(
    family: type[BackboneContract], tiny_images: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model, run = family().folder(tmp_path_factory), tmp_path / "run"
    concept = ("--instance_data_dir", tiny_images, "--instance_prompt", PROMPT, "--resolution", 32)
    rule = ("--max_train_steps", 60, "--window", 8, "--probe_every", 1, "--threshold", 0.9, "--learning_rate", 5e-2)
    samples = ("--num_validation_images", 1, "--num_inference_steps", 2)
    words = (*concept, *rule, *samples, "--pretrained_model_name_or_path", model, "--output_dir", run)
    answer = dvar("train", "dreambooth-lora", *words)
    assert answer.status == 0, answer.err
    result, config = (json.loads((run / name).read_text()) for name in ("result.json", "config.json"))
    assert result["verdict"]["reason"] == "stabilised", result["verdict"]
    expected = BACKBONES[family.pipeline].lora_settings
    assert config["mixed_precision"] == expected.get("mixed_precision", "no")
    assert config["gradient_checkpointing"] == expected.get("gradient_checkpointing", False)
    pipeline = run_model_card(run, model, size=32)
    size = {"height": 32, "width": 32, "num_inference_steps": 2, **family.guidance}
    pixels = [
        np.asarray(stock(prompt=PROMPT, generator=torch.Generator().manual_seed(5), **size).images[0], dtype=np.int64)
        for stock in (pipeline, family().load_stock(model))
    ]
    backbone = load_personalised_backbone(run, device="cpu")
    (ours,) = sample(backbone, [PROMPT], [5], size=32, steps=2, guidance=4.0)
    assert np.abs(pixels[0] - np.asarray(ours, dtype=np.int64)).max() <= 1
    assert np.abs(pixels[0] - pixels[1]).max() > 1
    assert dvar("generate", run, "--prompt", PROMPT, "--num_images", 1).status == 0
