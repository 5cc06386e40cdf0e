"""The Python lines that load the weight files of a run in stock diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterable

from dvar.training.run_layout import ATTENTION, EMBEDS, LORA, WEIGHTS, kind


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
