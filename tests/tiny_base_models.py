"""Tiny random pipelines of larger families: Stable Diffusion XL and 3, and Flux."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from dvar.testing import tiny_tokenizer


def tiny_sdxl(folder: Path) -> Path:
    """Save a Stable Diffusion XL of resolution 32 and return its folder."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=_build_autoencoder(),
        text_encoder=_build_clip(CLIPTextModel),
        text_encoder_2=_build_clip(CLIPTextModelWithProjection),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_sd3(folder: Path) -> Path:
    """Save a Stable Diffusion 3 of resolution 32 and return its folder."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_build_autoencoder(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=_build_clip(CLIPTextModelWithProjection),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_build_clip(CLIPTextModelWithProjection),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=_build_t5(),
        tokenizer_3=T5Tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder: Path) -> Path:
    """Save a Flux of resolution 32 and return its folder."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_build_autoencoder(shift_factor=0.0609, scaling_factor=1.5035),
        text_encoder=_build_clip(CLIPTextModel),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=_build_t5(),
        tokenizer_2=T5Tokenizer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def _build_autoencoder(**settings: float) -> Any:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **settings,
    )


def _build_clip(kind: Any) -> Any:
    tokenizer = tiny_tokenizer()
    return kind(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _build_t5() -> Any:
    return T5EncoderModel(T5Config(vocab_size=128, d_model=32, d_ff=64, d_kv=8, num_layers=1, num_heads=4))
