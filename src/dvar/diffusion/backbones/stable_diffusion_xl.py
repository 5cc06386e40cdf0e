"""The backbone of Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dvar.diffusion.backbones.ddpm import DiffusionBackbone
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower
from dvar.errors import ModelError


class StableDiffusionXL(DiffusionBackbone):
    """The parts of a Stable Diffusion XL, frozen and in eval mode, on one device.

    Source: Podell et al., SDXL (2023): the penultimate states of two text encoders, the pooled state of the second, and
        the size and the crop of the image condition the U-Net.
    Deviates: Every image counts as one of its training resolution, uncropped, which is what a pipeline assumes when it
        generates at that resolution; diffusers' script passes each image's own size and crop.
    """

    pipeline_class: ClassVar[str] = "StableDiffusionXLPipeline"
    title: ClassVar[str] = "Stable Diffusion XL"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    )
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({"add_watermarker": False})

    @property
    def unet(self) -> Any:
        """The denoising network."""
        return self.denoiser

    def check(self, name: str | Path) -> None:
        """Raise a `ModelError` for a refiner, which has one text encoder alone, and as its base class does."""
        super().check(name)
        if self.stock.config.get("requires_aesthetics_score"):
            raise ModelError(f"{name} is a refiner, which continues images of another model: train the base model")

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the penultimate states and the pooled one of a text encoder."""
        output = tower.encoder(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0] if tower.name == "text_encoder_2" else output.pooler_output

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the U-Net's prediction, as `StockBackbone.denoise`."""
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        height, width = (scale * side for side in noisy.shape[2:])
        size_and_crop = torch.tensor([height, width, 0, 0, height, width], device=noisy.device)
        prediction: Tensor = self.denoiser(
            noisy,
            times,
            encoder_hidden_states=torch.cat([tokens for tokens, _ in states.values()], dim=2),
            added_cond_kwargs={
                "text_embeds": states["text_encoder_2"][1],
                "time_ids": size_and_crop.expand(len(noisy), -1),
            },
        ).sample
        return prediction
