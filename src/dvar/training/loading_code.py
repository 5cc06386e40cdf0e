"""The Python lines that load the weight files of a run in stock diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterable

from dvar.training.run_layout import ATTENTION, EMBEDS, LORA, WEIGHTS, weights_kind


def import_lines(names: Iterable[str]) -> list[str]:
    """Return the import lines that `load_lines` of these files needs, with that of the pipeline."""
    lines = ["from diffusers import StableDiffusionPipeline"]
    return [*lines, "from safetensors.torch import load_file"] if ATTENTION in map(weights_kind, names) else lines


def load_lines(names: Iterable[str], folder: str = ".") -> list[str]:
    """Return the lines that load weight files into ``pipeline``, a stock `StableDiffusionPipeline`.

    Args:
        names: The names of the files.
        folder: The folder in which they are.

    Deviates: Custom Diffusion's weights are read by the U-Net itself, since the loader that diffusers documents for
        them changes nothing (its issue 9320).
    """
    ordered = sorted(names, key=lambda name: (WEIGHTS.index(weights_kind(name)), name))
    return [_load_line(name, folder) for name in ordered]


def _load_line(name: str, folder: str) -> str:
    """Return the line that loads one file."""
    quoted_folder = json.dumps(folder, ensure_ascii=False)
    quoted_path = json.dumps(name if folder == "." else f"{folder}/{name}", ensure_ascii=False)
    return {
        EMBEDS: f'pipeline.load_textual_inversion({quoted_folder}, weight_name="{name}")',
        LORA: f'pipeline.load_lora_weights({quoted_folder}, weight_name="{name}")',
        ATTENTION: f"pipeline.unet.load_state_dict(load_file({quoted_path}), strict=False)",
    }[weights_kind(name)]
