"""The backbone of FLUX.2 klein."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from torch import Tensor

from dvar.diffusion.backbones.flow import FlowBackbone
from dvar.diffusion.backbones.language_tower import LanguageTower, as_text, chat_template
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower
from dvar.diffusion.objective import Schedule

PROMPT_LENGTH = 512
LAYERS = (9, 18, 27)
"""The layers of the text encoder whose states make the condition, as the stock pipeline reads them."""


class Flux2Klein(FlowBackbone):
    """The parts of a FLUX.2 klein, frozen and in eval mode, on one device.

    Its latents are packed two by two and normalised by the statistics that its autoencoder keeps, so here they have
    four times the channels of the autoencoder, [B, 4C, h/2, w/2].

    Source: diffusers' train_dreambooth_lora_flux2_klein.py: its condition, its latents, its default matrices.
    Deviates: Latents are drawn from the autoencoder's posterior as in all families; the script takes the mode.
    """

    pipeline_class: ClassVar[str] = "Flux2KleinPipeline"
    title: ClassVar[str] = "FLUX.2 klein"
    denoiser_name: ClassVar[str] = "transformer"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": None})

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """The matrices of the transformer that LoRA adapts, by choice: those of both kinds of blocks."""
        last = [f"single_transformer_blocks.{i}.attn.to_out" for i in range(self.denoiser.config.num_single_layers)]
        return {"attention": ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj", *last)}

    @property
    def schedule(self) -> Schedule:
        """The noise and the target under which it was trained, with the scale of each channel [4C, 1, 1]."""
        mean, variance = self.vae.bn.running_mean, self.vae.bn.running_var
        scale = (variance + self.vae.config.batch_norm_eps).rsqrt()
        scale, mean = (values.float().cpu().reshape(-1, 1, 1) for values in (scale, mean))
        return Schedule.flow(self.noise.float().cpu(), scale, mean, self.density)

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB images, packed two by two, float32 [n, 8C, h/2, w/2] on the CPU."""
        parts = super().encode(images).chunk(2, dim=1)
        return torch.cat([Flux2KleinPipeline._patchify_latents(part.contiguous()) for part in parts], dim=1)

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return the states of three layers of the language model, side by side."""
        ids, mask = as_text(tower, input_ids)
        layers = tower.encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return (torch.cat([layers.hidden_states[layer] for layer in LAYERS], dim=2),)

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the transformer's prediction, as `StockBackbone.denoise`."""
        (tokens,) = states["text_encoder"]
        prediction: Tensor = self.denoiser(
            hidden_states=Flux2KleinPipeline._pack_latents(noisy),
            timestep=times / 1000,
            guidance=None,
            encoder_hidden_states=tokens,
            txt_ids=Flux2KleinPipeline._prepare_text_ids(tokens).to(noisy.device),
            img_ids=Flux2KleinPipeline._prepare_latent_ids(noisy).to(noisy.device),
        ).sample
        return prediction.transpose(1, 2).reshape(noisy.shape)

    @property
    def towers(self) -> tuple[LanguageTower, ...]:
        """Its text encoder."""
        template = chat_template(self.tokenizer, thinking=False)
        return (LanguageTower("text_encoder", self.tokenizer, self.text_encoder, PROMPT_LENGTH, None, template),)
