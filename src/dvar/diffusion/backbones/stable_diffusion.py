"""The backbone of Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor

from dvar.diffusion.backbones.ddpm import DiffusionBackbone
from dvar.diffusion.backbones.prompt_cache import States


class StableDiffusion(DiffusionBackbone):
    """The parts of a Stable Diffusion 1.x or 2.x, frozen and in eval mode, on one device."""

    pipeline_class: ClassVar[str] = "StableDiffusionPipeline"
    title: ClassVar[str] = "Stable Diffusion"
    options: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )

    @property
    def unet(self) -> Any:
        """The denoising network."""
        return self.denoiser

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the U-Net's prediction, as `StockBackbone.denoise`."""
        (condition,) = states["text_encoder"]
        prediction: Tensor = self.denoiser(noisy, times, encoder_hidden_states=condition).sample
        return prediction
