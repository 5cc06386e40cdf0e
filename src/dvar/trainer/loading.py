"""The weight files that runs leave, and the lines of Python with which anyone loads them.  Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

EMBEDS = "learned_embeds.safetensors"
LORA = "pytorch_lora_weights.safetensors"
ATTENTION = "custom_diffusion_weights.safetensors"
WEIGHTS = (EMBEDS, LORA, ATTENTION)
"""By name: a new word's vectors; a low-rank change of the model; whole weights under the U-Net's own names."""


def at_step(name: str, step: int) -> str:
    """The name of a weight file that holds what was learned at ``step``, where that is not the last."""
    return f"{Path(name).stem}-steps-{step}{Path(name).suffix}"


def of_word(word: str) -> str:
    """The name of the file of one new word among several: learned_embeds.new1.safetensors of <new1>."""
    return f"{Path(EMBEDS).stem}.{re.sub(r'[^A-Za-z0-9_-]', '', word)}{Path(EMBEDS).suffix}"


def kind(name: str) -> str:
    """Which of `WEIGHTS` a file is that `at_step` or `of_word` named."""
    return next(known for known in WEIGHTS if name.startswith(Path(known).stem))


def imports(names: Iterable[str]) -> list[str]:
    """The import lines that `loads` of these files needs, the pipeline's among them."""
    plain = ["from diffusers import StableDiffusionPipeline"]
    return [*plain, "from safetensors.torch import load_file"] if ATTENTION in map(kind, names) else plain


def loads(names: Iterable[str], folder: str = ".") -> list[str]:
    """The lines that put these files of ``folder`` into ``pipeline``, a stock `StableDiffusionPipeline`.

    Deviates: Custom Diffusion's weights are read by the U-Net itself, since the loader that diffusers documents for
    them changes nothing (its issue 9320).
    """
    return [_line(name, folder) for name in sorted(names, key=lambda name: (WEIGHTS.index(kind(name)), name))]


def _line(name: str, folder: str) -> str:
    place = json.dumps(folder, ensure_ascii=False)
    whole = json.dumps(name if folder == "." else f"{folder}/{name}", ensure_ascii=False)
    return {
        EMBEDS: f'pipeline.load_textual_inversion({place}, weight_name="{name}")',
        LORA: f'pipeline.load_lora_weights({place}, weight_name="{name}")',
        ATTENTION: f"pipeline.unet.load_state_dict(load_file({whole}), strict=False)",
    }[kind(name)]
