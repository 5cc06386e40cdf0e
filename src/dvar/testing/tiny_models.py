"""Tiny base models, a CLIP and images: their weights are random, but every shape, file and code path is real."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dvar.testing.tiny_parts import (
    WORDS,
    build_autoencoder,
    build_ldm_bert,
    build_projected_text_encoder,
    build_t5,
    build_text_encoder,
    build_unet,
    tiny_bert_tokenizer,
    tiny_t5_tokenizer,
    tiny_tokenizer,
)


def tiny_pipeline(
    folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 0
) -> Path:
    """Save a `StableDiffusionPipeline` with random weights, of 1.2 MB, to ``folder`` and return the folder.

    The same arguments give the same weights, and the global random state is left as it was.

    Args:
        folder: Where to save.
        resolution: Side of its images in pixels, 32 or a larger multiple of 8; latents are a quarter of it and have 4
            channels.
        vocabulary: Words that are one token each; every other text is spelled out.
        seed: Seed of the weights.
    """
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(vocabulary)
        pipeline = StableDiffusionPipeline(
            vae=build_autoencoder(resolution),
            text_encoder=build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(resolution // 4),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_xl_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0) -> Path:
    """Save a random `StableDiffusionXLPipeline` to ``folder`` and return the folder: see `tiny_pipeline`."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        unet = build_unet(
            resolution // 4,
            cross_attention_dim=64,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=build_autoencoder(resolution),
            text_encoder=build_text_encoder(tokenizer),
            text_encoder_2=build_projected_text_encoder(tokenizer),
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sd3_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0, t5: bool = False) -> Path:
    """Save a random `StableDiffusion3Pipeline` to ``folder`` and return the folder: see `tiny_pipeline`.

    Without ``t5`` stock diffusers loads it with ``text_encoder_3=None, tokenizer_3=None``.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=resolution // 4,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=64,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            pos_embed_max_size=resolution // 8,
            qk_norm="rms_norm",
        ).eval()
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=build_autoencoder(resolution, shift_factor=0.1),
            text_encoder=build_projected_text_encoder(tokenizer),
            text_encoder_2=build_projected_text_encoder(tokenizer),
            text_encoder_3=build_t5(tiny_t5_tokenizer(), 64) if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=tiny_tokenizer(),
            tokenizer_3=tiny_t5_tokenizer() if t5 else None,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_ldm_pipeline(folder: str | Path, *, resolution: int = 32, seed: int = 0) -> Path:
    """Save a random `LDMTextToImagePipeline` to ``folder`` and return the folder: see `tiny_pipeline`.

    Its latents are an eighth of its images, as the stock pipeline takes for granted.
    """
    import torch
    from diffusers import DDIMScheduler, LDMTextToImagePipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_bert_tokenizer()
        pipeline = LDMTextToImagePipeline(
            vqvae=build_autoencoder(resolution, levels=4),
            bert=build_ldm_bert(tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(resolution // 8),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_clip(folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 1) -> Path:
    """Save a `CLIPModel` with random weights, its tokenizer and its processor to ``folder`` and return the folder.

    It reads images of ``resolution`` pixels and texts of 77 tokens. Its embeddings have 16 numbers.
    """
    import torch
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = tiny_tokenizer(vocabulary)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shared, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
    vision = {**shared, "image_size": resolution, "patch_size": resolution // 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": resolution}, crop_size={"height": resolution, "width": resolution}
    ).save_pretrained(folder)
    return Path(folder)


def tiny_concept(folder: str | Path, *, images: int = 4, size: int = 64) -> Path:
    """Save PNG images of one banded ball to ``folder`` and return the folder.

    The ball is the same in each image; its place and its background differ.

    Args:
        folder: Where to save.
        images: Number of images.
        size: Side of the images in pixels.
    """
    from PIL import Image, ImageDraw

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(images):
        image = Image.new("RGB", (size, size), (40 + 50 * (index % 4), 200 - 40 * (index % 4), 120 + 30 * (index % 3)))
        left, top, side = size * (1 + index % 3) // 8, size * (1 + index % 2) // 8, size * 5 // 8
        pen = ImageDraw.Draw(image)
        pen.ellipse((left, top, left + side, top + side), fill=(220, 60, 50), outline=(30, 20, 20))
        pen.rectangle(
            (left + side // 8, top + side * 2 // 5, left + side * 7 // 8, top + side * 3 // 5), fill=(250, 230, 120)
        )
        image.save(folder / f"{index:02d}.png")
    return folder
