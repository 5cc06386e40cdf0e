"""The backbone of Qwen-Image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from torch import Tensor

from dvar.diffusion.backbones.flow import FlowBackbone
from dvar.diffusion.backbones.language_tower import LanguageTower, as_text
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower
from dvar.diffusion.objective import Schedule

PROMPT_LENGTH = 512
"""Tokens of a prompt that the transformer reads, as the stock pipeline takes."""


class QwenImage(FlowBackbone):
    """The parts of a Qwen-Image, frozen and in eval mode, on one device.

    Its autoencoder is one of videos, for which an image is a single frame, and each channel of its latents has a mean
    and a deviation. The instruction before every prompt is read by the language model and not by the transformer.

    Source: diffusers' train_dreambooth_lora_qwen_image.py: its condition, its latents, its default matrices.
    """

    pipeline_class: ClassVar[str] = "QwenImagePipeline"
    title: ClassVar[str] = "Qwen-Image"
    denoiser_name: ClassVar[str] = "transformer"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": None})
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"attention": ("to_k", "to_q", "to_v", "to_out.0")}
    )

    @property
    def schedule(self) -> Schedule:
        """The noise and the target under which it was trained, with the scale of each channel [C, 1, 1]."""
        mean, deviation = (
            torch.tensor(values).reshape(-1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )
        return Schedule.flow(self.noise.float().cpu(), 1 / deviation, mean, self.density)

    def generation_options(
        self, prompts: Sequence[str], guidance: float, negatives: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments of the stock pipeline, which guides away from a text that it must be given."""
        texts = [negative or " " for negative in negatives or [""] * len(prompts)]
        negative = {"negative_prompt": texts} if guidance > 1 else {}
        return {"prompt": list(prompts), "true_cfg_scale": guidance, **negative}

    def _moments(self, pixels: Tensor) -> Tensor:
        """Return the posterior moments of an image, which is a video of one frame, [1, 2C, h, w]."""
        moments: Tensor = self.vae.encode(pixels.unsqueeze(2)).latent_dist.parameters
        return moments.squeeze(2)

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the last states of the language model without those of the instruction, and where they are text."""
        ids, mask = as_text(tower, input_ids)
        longest, start = int(mask.sum(dim=1).max()), self.stock.prompt_template_encode_start_idx
        layers = tower.encoder(
            input_ids=ids[:, :longest], attention_mask=mask[:, :longest], output_hidden_states=True
        ).hidden_states
        tokens = F.pad(layers[-1][:, start:], (0, 0, 0, ids.shape[1] - longest))
        return tokens * mask[:, start:, None], mask[:, start:]

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the transformer's prediction, as `StockBackbone.denoise`."""
        count, channels, height, width = noisy.shape
        tokens, mask = states["text_encoder"]
        longest = int(mask.sum(dim=1).max())  # the pipeline pads to the longest prompt too
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        prediction: Tensor = self.denoiser(
            hidden_states=QwenImagePipeline._pack_latents(noisy, count, channels, height, width),
            timestep=times / 1000,
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=None if bool(mask.all()) else mask,
            img_shapes=[[(1, height // 2, width // 2)]] * count,
        ).sample
        unpacked: Tensor = QwenImagePipeline._unpack_latents(prediction, height, width, 1)
        return unpacked.squeeze(2)

    @property
    def towers(self) -> tuple[LanguageTower, ...]:
        """Its text encoder."""
        length = PROMPT_LENGTH + self.stock.prompt_template_encode_start_idx
        template = self.stock.prompt_template_encode.format
        return (LanguageTower("text_encoder", self.tokenizer, self.text_encoder, length, None, template),)
