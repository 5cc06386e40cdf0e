"""The weight files that runs leave, and the lines of Python with which anyone loads them.  Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dvar._version import __version__
from dvar.config.training import BUNDLED_MODEL, AnyConfig
from dvar.errors import NonFiniteLoss
from dvar.files import write_whole

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


RESULT = "result.json"


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` as safetensors, with ``metadata`` beside the format's name.

    Raises: NonFiniteLoss when one of them is not finite; then nothing is written.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"the values of {name} are not finite and are not exported: lower the learning rate")
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(kept, metadata={"format": "pt", **(metadata or {})}))


def provenance(config: AnyConfig, base: str, step: int) -> dict[str, str]:
    """Return what every weight file says of itself: its maker, its method, its base model by name and by ``base``, the
    digest of what is in it, and its step.
    """
    return {
        "dvar": __version__,
        "method": config.method,
        "base_model": public_name(config),
        "base_sha256": base,
        "step": str(step),
    }


def public_name(config: AnyConfig) -> str:
    """Return the base model's name for others: a hub id as it is, of a folder the last part alone."""
    name = config.pretrained_model_name_or_path
    return name if _on_hub(name) else Path(name).name


def by_word(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Return ``files``, file name to what is in it, with each of several new words in a file of its own.

    Stock diffusers reads one word from a file.  A single word stays in `EMBEDS`.
    """
    words = files.get(EMBEDS, {})
    if len(words) < 2:
        return dict(files)
    apart: dict[str, Mapping[str, Tensor]] = {}
    for word, vectors in words.items():
        name = of_word(word)
        apart[of_word(f"{word}_{len(apart)}") if name in apart else name] = {word: vectors}
    return {**apart, **{name: tensors for name, tensors in files.items() if name != EMBEDS}}


def _on_hub(name: str) -> bool:
    return name != BUNDLED_MODEL and not Path(name).expanduser().exists()
