"""The second bundled model learns a concept by the command line, and stock diffusers loads what it learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import dvar

from dvar import mini
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.sampling import sample
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing.model_card import run_model_card

PROMPT = "a photo of <thing> on the beach"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["textual-inversion", "dreambooth-lora"])
def test_mini_flow_learns_and_the_code_of_its_card_generates_the_same_image(method: str, tmp_path: Path) -> None:
    name, images = next(iter(mini.concepts().items()))
    word = ("--placeholder_token", "<thing>", "--initializer_token", mini.noun(name))
    run = ("--pretrained_model_name_or_path", "mini-flow", "--preset", "smoke", "--output_dir", tmp_path / "run")
    answer = dvar("train", method, "--instance_data_dir", images, *word, *run)
    assert answer.status == 0, answer.err
    pipeline = run_model_card(tmp_path / "run")
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 4.0, "height": 64, "width": 64}
    theirs = pipeline(PROMPT, generator=torch.Generator().manual_seed(5), **options).images[0]
    learned = load_personalised_backbone(tmp_path / "run", device="cpu")
    base, plain = load_backbone(mini.path("mini-flow"), device="cpu"), PROMPT.replace("<thing>", mini.noun(name))
    prompts = ((learned, PROMPT), (base, plain))
    ours, without = (sample(model, [prompt], [5], size=64, steps=2, guidance=4.0)[0] for model, prompt in prompts)
    pixels = [np.asarray(image, dtype=np.int64) for image in (theirs, ours, without)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1
    assert np.abs(pixels[0] - pixels[2]).max() > 1
