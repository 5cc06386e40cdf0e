"""What ships, laid out as stages that ended: every stage loads, with the weights that ship."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dvar import mini
from pretraining import autoencoder, clip, recogniser, training, unet
from pretraining.evaluate import ROOT
from pretraining.ship import MADE_OF
from pretraining.training import load_average
from pretraining.unpack import unpack


def test_every_stage_has_the_weights_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORK", tmp_path)
    assert unpack(ROOT, tmp_path) == list(MADE_OF)
    pipe = StableDiffusionPipeline.from_pretrained(mini.path(), safety_checker=None)
    text = clip.load("clip", len(pipe.tokenizer)).text_model.state_dict()
    channels = pipe.vae.config.latent_channels
    pairs = [
        (load_average("unet", unet.build(channels)).state_dict(), pipe.unet.state_dict()),
        (load_average("autoencoder", autoencoder.build(channels)).state_dict(), pipe.vae.state_dict()),
        (text, pipe.text_encoder.state_dict()),
    ]
    for unpacked, ships in pairs:
        assert all(torch.equal(unpacked[key], value.float()) for key, value in ships.items())
    for name in ("vision", "judge"):
        clip.load(name, len(pipe.tokenizer))
    load_average("recogniser", recogniser.build())
    further = unet.prepare("further")
    assert all(torch.equal(value, pipe.unet.state_dict()[key]) for key, value in further.state_dict().items())
    assert further.training
    assert all(parameter.requires_grad for parameter in further.parameters())
    recipe = json.loads((ROOT / "recipe.json").read_text())
    assert json.loads((tmp_path / "unet" / "stage.json").read_text()) == recipe["unet"]
    assert unpack(ROOT, tmp_path) == []
