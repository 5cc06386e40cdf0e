"""The backbone of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dvar.diffusion.backbones.flow import FlowBackbone
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower
from dvar.diffusion.timesteps import LOGIT_NORMAL, Density

T5 = "text_encoder_3"
T5_LENGTH = 256
"""Tokens of a prompt for T5, as the stock pipeline takes; without T5 as many empty tokens stand in their place."""
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


class StableDiffusion3(FlowBackbone):
    """The parts of a Stable Diffusion 3 or 3.5, with or without T5, frozen and in eval mode, on one device.

    Source: Esser et al., Scaling Rectified Flow Transformers (2024): a transformer over the tokens of image and text,
        trained by flow matching; the penultimate states of two CLIPs side by side, then those of T5.
    """

    pipeline_class: ClassVar[str] = "StableDiffusion3Pipeline"
    title: ClassVar[str] = "Stable Diffusion 3"
    denoiser_name: ClassVar[str] = "transformer"
    density: ClassVar[Density] = LOGIT_NORMAL
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType(
        {"text_encoder": "clip_l", "text_encoder_2": "clip_g", T5: None}
    )
    optional: ClassVar[tuple[str, ...]] = (T5,)
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {"attention": tuple(f"attn.{name}" for name in _ATTENTION)}
    )

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the penultimate states and the pooled one of a CLIP, or the states of T5."""
        if tower.name == T5:
            return super().encode_text(tower, input_ids)
        output = tower.encoder(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the transformer's prediction, as `StockBackbone.denoise`."""
        clips = [parts for name, parts in states.items() if name != T5]
        tokens = torch.cat([parts[0] for parts in clips], dim=2)
        width = self.denoiser.config.joint_attention_dim
        tokens = F.pad(tokens, (0, width - tokens.shape[2]))
        t5 = states[T5][0].to(tokens.dtype) if T5 in states else tokens.new_zeros(len(tokens), T5_LENGTH, width)
        prediction: Tensor = self.denoiser(
            hidden_states=noisy,
            timestep=times,
            encoder_hidden_states=torch.cat([tokens, t5], dim=1),
            pooled_projections=torch.cat([pooled for _, pooled in clips], dim=1),
        ).sample
        return prediction

    def _length(self, name: str, tokenizer: Any, encoder: Any) -> int:
        """Return the tokens of an encoded prompt, which T5 itself does not bound."""
        return T5_LENGTH if name == T5 else super()._length(name, tokenizer, encoder)
