"""A tiny random Stable Diffusion, pictures to train it on, and nothing to download: for our tests and for yours.

The weights are random, so nothing it draws means anything; every shape, file and code path is that of a real model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = """
a an the my of in on at with and to one photo picture rendering drawing depiction painting illustration image style good
nice bright dark clean dirty small large big cool weird close up cropped red green blue yellow white black mug vase cat
dog house lamp chair boat bird robot sculpture toy object beach grass snow night table ktn pll ucd
""".split()  # noqa: SIM905 (sixty words read better as text)
ALPHABET = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
START, END = "<|startoftext|>", "<|endoftext|>"


def tiny_pipeline(
    folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 0
) -> Path:
    """Return ``folder``, into which a random `StableDiffusionPipeline` was saved: 1.2 MB, in half a second.

    ``resolution`` is the side of its pictures in pixels, 32 or any larger multiple of 8; latents are a quarter of it
    and have 4 channels.  Each word of ``vocabulary`` is one token, every other text is spelled out.  The same
    arguments give the same weights, and the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer(vocabulary)
        pipeline = StableDiffusionPipeline(
            vae=_autoencoder(resolution),
            text_encoder=_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=_unet(resolution // 4),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_tokenizer(words: Iterable[str] = WORDS) -> CLIPTokenizer:
    """Return a real `CLIPTokenizer` whose byte pairs were merged until each of ``words`` is a single token."""
    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in dict.fromkeys(words)}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for pieces in spellings.values() for pair in pairwise(pieces)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spellings = {word: _merged(pieces, best) for word, pieces in spellings.items()}
    pieces = [*ALPHABET, *(letter + "</w>" for letter in ALPHABET), *map("".join, merges), START, END]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def tiny_clip(folder: str | Path, *, resolution: int = 32, vocabulary: Iterable[str] = WORDS, seed: int = 1) -> Path:
    """Return ``folder``, into which a random `CLIPModel` was saved with its tokenizer and its processor, to score with.

    It reads pictures of ``resolution`` pixels and texts of 77 tokens.  Vectors have 16 numbers.
    """
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


def tiny_concept(folder: str | Path, *, pictures: int = 4, size: int = 64) -> Path:
    """Return ``folder``, with ``pictures`` PNG pictures in it, ``size`` pixels square, of one banded ball.

    The ball is the same in each; its place and its background differ.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(pictures):
        picture = Image.new(
            "RGB", (size, size), (40 + 50 * (index % 4), 200 - 40 * (index % 4), 120 + 30 * (index % 3))
        )
        left, top, side = size * (1 + index % 3) // 8, size * (1 + index % 2) // 8, size * 5 // 8
        pen = ImageDraw.Draw(picture)
        pen.ellipse((left, top, left + side, top + side), fill=(220, 60, 50), outline=(30, 20, 20))
        pen.rectangle(
            (left + side // 8, top + side * 2 // 5, left + side * 7 // 8, top + side * 3 // 5), fill=(250, 230, 120)
        )
        picture.save(folder / f"{index:02d}.png")
    return folder


def _merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_factor=5.0,
        )
    ).eval()


def _autoencoder(resolution: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=resolution,
    ).eval()


def _unet(side: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()
