"""Every family of base models with a tiny pipeline, as the contracts test it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffusers import FluxPipeline, QwenImagePipeline
from torch import Tensor

from dvar.testing import (
    BackboneContract,
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ldm_pipeline,
    tiny_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)


class StableDiffusionFamily(BackboneContract):
    pipeline = "StableDiffusionPipeline"
    save_pipeline = staticmethod(tiny_pipeline)


class LatentDiffusionFamily(BackboneContract):
    pipeline = "LDMTextToImagePipeline"
    save_pipeline = staticmethod(tiny_ldm_pipeline)


class StableDiffusionXLFamily(BackboneContract):
    pipeline = "StableDiffusionXLPipeline"
    save_pipeline = staticmethod(tiny_xl_pipeline)


class StableDiffusion3Family(BackboneContract):
    pipeline = "StableDiffusion3Pipeline"
    save_pipeline: Callable[[Path], Path] = staticmethod(tiny_sd3_pipeline)
    absent: ClassVar[Mapping[str, Any]] = {"text_encoder_3": None, "tokenizer_3": None}


class StableDiffusion3WithT5Family(StableDiffusion3Family):
    save_pipeline = staticmethod(partial(tiny_sd3_pipeline, t5=True))
    absent: ClassVar[Mapping[str, Any]] = {}


class FluxFamily(BackboneContract):
    pipeline = "FluxPipeline"
    save_pipeline: Callable[[Path], Path] = staticmethod(tiny_flux_pipeline)
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 3.5}  # that of training, which the transformer reads

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
        return packed

    def unpack(self, latents: Tensor) -> Tensor:
        unpacked: Tensor = FluxPipeline._unpack_latents(latents, 8, 8, 1)
        return unpacked


class FluxWithoutGuidanceFamily(FluxFamily):
    save_pipeline = staticmethod(partial(tiny_flux_pipeline, guidance=False))


class Flux2KleinFamily(BackboneContract):
    pipeline = "Flux2KleinPipeline"
    save_pipeline = staticmethod(tiny_klein_pipeline)

    def pack(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def unpack(self, latents: Tensor) -> Tensor:
        return latents.transpose(1, 2).reshape(len(latents), -1, 4, 4)


class ZImageFamily(BackboneContract):
    pipeline = "ZImagePipeline"
    save_pipeline = staticmethod(tiny_z_image_pipeline)
    no_guidance: ClassVar[Mapping[str, Any]] = {"guidance_scale": 0.0}


class QwenImageFamily(BackboneContract):
    pipeline = "QwenImagePipeline"
    save_pipeline = staticmethod(tiny_qwen_image_pipeline)
    guidance: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 4.0, "negative_prompt": " "}
    no_guidance: ClassVar[Mapping[str, Any]] = {"true_cfg_scale": 1.0}
    frames = True

    def pack(self, latents: Tensor) -> Tensor:
        packed: Tensor = QwenImagePipeline._pack_latents(latents, *latents.shape)
        return packed

    def unpack(self, latents: Tensor) -> Tensor:
        unpacked: Tensor = QwenImagePipeline._unpack_latents(latents, 8, 8, 1)
        return unpacked.squeeze(2)
