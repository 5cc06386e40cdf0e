"""The backbone of FLUX.1."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from dvar.diffusion.backbones.flow import FlowBackbone
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower

T5_LENGTH = 512
"""Tokens of a prompt for T5, as the stock pipeline takes."""
TRAINING_GUIDANCE = 3.5
"""The guidance that a distilled model is trained under, as in diffusers' script."""
_ATTENTION = ("to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class Flux(FlowBackbone):
    """The parts of a FLUX.1, frozen and in eval mode, on one device.

    CLIP gives one vector for the whole prompt, T5 one for each token. T5 learns no new word: its gradient would pass
    through a language model of 4.7 billion weights at each step. Nor has a word several vectors: the stock pipeline
    writes their tokens out for CLIP alone, and T5 would read another prompt than in training. Of a distilled model, the
    guidance is an input.

    Source: diffusers' train_dreambooth_lora_flux.py: its condition, its guidance, its default matrices.
    """

    pipeline_class: ClassVar[str] = "FluxPipeline"
    title: ClassVar[str] = "FLUX.1"
    denoiser_name: ClassVar[str] = "transformer"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": "", "text_encoder_2": None})
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"attention": (*(f"attn.{name}" for name in _ATTENTION), *_FEED_FORWARD)}
    )

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the pooled state of CLIP, or the states of T5."""
        output = tower.encoder(input_ids)
        return (output.pooler_output if tower.name == "text_encoder" else output[0],)

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the transformer's prediction, as `StockBackbone.denoise`."""
        count, channels, height, width = noisy.shape
        (pooled,), (tokens,) = states["text_encoder"], states["text_encoder_2"]
        prediction: Tensor = self.denoiser(
            hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
            timestep=times / 1000,
            guidance=self._guidance(count),
            pooled_projections=pooled,
            encoder_hidden_states=tokens,
            txt_ids=torch.zeros(tokens.shape[1], 3, device=noisy.device, dtype=noisy.dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        ).sample
        unpacked: Tensor = FluxPipeline._unpack_latents(prediction, height, width, 1)
        return unpacked

    def _guidance(self, count: int) -> Tensor | None:
        """Return the guidance of ``count`` samples, [count], as far as it is an input."""
        if not self.denoiser.config.guidance_embeds:
            return None
        return torch.full([count], TRAINING_GUIDANCE, device=self.device, dtype=torch.float32)

    def _length(self, name: str, tokenizer: Any, encoder: Any) -> int:
        """Return the tokens of an encoded prompt, which T5 itself does not bound."""
        return T5_LENGTH if name == "text_encoder_2" else super()._length(name, tokenizer, encoder)
