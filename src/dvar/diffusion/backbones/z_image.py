"""The backbone of Z-Image."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from dvar.diffusion.backbones.flow import FlowBackbone
from dvar.diffusion.backbones.language_tower import LanguageTower, as_text, chat_template
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower

PROMPT_LENGTH = 512


class ZImage(FlowBackbone):
    """The parts of a Z-Image, frozen and in eval mode, on one device.

    Its transformer counts time from noise to image and predicts image minus noise, so both are turned round here. Its
    pipeline counts guidance from 0, which is none.

    Source: diffusers' train_dreambooth_lora_z_image.py: its condition and its default matrices.
    Deviates: Latents are drawn from the autoencoder's posterior as in all families; the script takes the mode.
    """

    pipeline_class: ClassVar[str] = "ZImagePipeline"
    title: ClassVar[str] = "Z-Image"
    denoiser_name: ClassVar[str] = "transformer"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": None})
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"attention": ("to_k", "to_q", "to_v", "to_out.0")}
    )

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the penultimate states of the language model, and where they are text."""
        ids, mask = as_text(tower, input_ids)
        layers = tower.encoder(input_ids=ids, attention_mask=mask.bool(), output_hidden_states=True)
        return layers.hidden_states[-2], mask.bool()

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the transformer's prediction, as `StockBackbone.denoise`."""
        prompts = [tokens[is_text] for tokens, is_text in zip(*states["text_encoder"], strict=True)]
        frames = list(noisy.to(self.denoiser.dtype).unsqueeze(2).unbind())  # a video of one frame each
        prediction = self.denoiser(frames, (1000 - times) / 1000, prompts, return_dict=False)[0]
        return -torch.stack(prediction).squeeze(2).float()

    @property
    def towers(self) -> tuple[LanguageTower, ...]:
        """Its text encoder."""
        template = chat_template(self.tokenizer, thinking=True)
        return (LanguageTower("text_encoder", self.tokenizer, self.text_encoder, PROMPT_LENGTH, None, template),)
