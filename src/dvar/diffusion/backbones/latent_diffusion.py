"""The backbone of Latent Diffusion with a BERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from dvar.diffusion.backbones.ddpm import DiffusionBackbone
from dvar.diffusion.backbones.prompt_cache import States
from dvar.diffusion.backbones.stock import TextTower

BERT = "bert"


class LatentDiffusion(DiffusionBackbone):
    """The parts of a Latent Diffusion with a BERT, frozen and in eval mode, on one device.

    Source: Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (2022), the text-to-image model
        of the paper's first version: a U-Net whose cross-attention reads the states of a transformer over BERT's words.
    """

    pipeline_class: ClassVar[str] = "LDMTextToImagePipeline"
    title: ClassVar[str] = "Latent Diffusion"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({BERT: ""})

    @property
    def text_encoder(self) -> Any:
        """Its text encoder."""
        return self.stock.bert

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.stock.vqvae

    @property
    def unet(self) -> Any:
        """The denoising network."""
        return self.denoiser

    @property
    def towers(self) -> tuple[TextTower, ...]:
        """Its text encoder."""
        length = self._length(BERT, self.tokenizer, self.text_encoder)
        return (TextTower(BERT, self.tokenizer, self.text_encoder, length),)

    def generation_options(
        self, prompts: Sequence[str], guidance: float, negatives: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments of the stock pipeline, which cannot turn pixels of half precision into images."""
        return {**super().generation_options(prompts, guidance, negatives), "output_type": "pt"}

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the U-Net's prediction, as `StockBackbone.denoise`."""
        (condition,) = states[BERT]
        prediction: Tensor = self.denoiser(noisy, times, encoder_hidden_states=condition).sample
        return prediction
