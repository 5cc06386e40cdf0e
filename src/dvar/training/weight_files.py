"""The weight files of a run: how they are written and what they say of themselves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from dvar._version import __version__
from dvar.config.training import BUNDLED_MODEL, AnyConfig
from dvar.errors import NonFiniteLoss
from dvar.files import write_whole
from dvar.training.run_layout import EMBEDS, of_word


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
