"""Tiny base models of the families that match flows in packed latents: FLUX.1, FLUX.2 klein, Z-Image, Qwen-Image."""

from __future__ import annotations

from pathlib import Path

from dvar.testing.tiny_parts import (
    build_autoencoder,
    build_qwen3,
    build_qwen_vl,
    build_t5,
    build_text_encoder,
    tiny_qwen_tokenizer,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)

KLEIN_LAYERS = 27
"""The layer of its text encoder up to which the stock pipeline of FLUX.2 klein reads."""


def tiny_flux_pipeline(
    folder: str | Path, *, resolution: int = 32, seed: int = 0, guidance: bool = True, single_layers: int = 1
) -> Path:
    """Save a random `FluxPipeline` to ``folder`` and return the folder: see `tiny_pipeline`.

    Args:
        folder: Where to save.
        resolution: Side of its images in pixels, a multiple of 16.
        seed: Seed of the weights.
        guidance: Whether its transformer reads the guidance as an input, as that of FLUX.1 dev.
        single_layers: Blocks of its transformer that read image and text as one.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, t5_tokenizer = tiny_tokenizer(), tiny_t5_tokenizer()
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=single_layers,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        ).eval()
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=build_autoencoder(resolution, shift_factor=0.0609, scaling_factor=1.5035),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=build_t5(t5_tokenizer),
            tokenizer_2=t5_tokenizer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_klein_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0) -> Path:
    """Save a random `Flux2KleinPipeline` to ``folder`` and return the folder: see `tiny_pipeline`."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_qwen_tokenizer()
        vae = AutoencoderKLFlux2(
            sample_size=resolution,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ).eval()
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        transformer = Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=[4, 4, 4, 4],
            guidance_embeds=False,
        ).eval()
        pipeline = Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=build_qwen3(tokenizer, KLEIN_LAYERS),
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_z_image_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0) -> Path:
    """Save a random `ZImagePipeline` to ``folder`` and return the folder: see `tiny_pipeline`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_qwen_tokenizer()
        transformer = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[1024, 32, 32],
        ).eval()
        with torch.no_grad():  # which the model leaves as the memory was
            transformer.x_pad_token.normal_()
            transformer.cap_pad_token.normal_()
        pipeline = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=build_autoencoder(resolution, shift_factor=0.1159, scaling_factor=0.3611),
            text_encoder=build_qwen3(tokenizer, 2),
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_qwen_image_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0) -> Path:
    """Save a random `QwenImagePipeline` to ``folder`` and return the folder: see `tiny_pipeline`.

    Its autoencoder knows no size, so ``resolution`` is there for the sake of its likes.
    """
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_qwen_tokenizer()
        vae = AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 2],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 1.5, 1.0, 0.8],
        ).eval()
        transformer = QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ).eval()
        pipeline = QwenImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=build_qwen_vl(tokenizer),
            tokenizer=tokenizer,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)
