"""The weight files of a run and their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from dvar._version import __version__
from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.errors import NonFiniteLoss
from dvar.files import write_atomically
from dvar.training.run_layout import EMBEDS, of_token

if TYPE_CHECKING:  # a report names a base model as these files do, and needs no torch
    from torch import Tensor


def write_weights(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write ``tensors`` as safetensors.

    Args:
        path: The file.
        tensors: Tensors by name.
        metadata: Metadata beside the format's name.

    Raises:
        NonFiniteLoss: A value is not finite; nothing is written.
    """
    import torch
    from safetensors.torch import save

    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NonFiniteLoss(f"the values of {name} are not finite and are not exported: lower the learning rate")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, _sort_metadata(save(contiguous, metadata={"format": "pt", **(metadata or {})})))


def _sort_metadata(content: bytes) -> bytes:
    """Return a safetensors file with its metadata sorted; the library writes them in an order of its own each time."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def provenance(config: TrainingConfig, base_digest: str, step: int) -> dict[str, str]:
    """Return the metadata of every weight file: dvar's version, the method, the base model and its digest, the step."""
    return {
        "dvar": __version__,
        "method": config.method,
        "base_model": public_model_name(config),
        "base_sha256": base_digest,
        "step": str(step),
    }


def public_model_name(config: TrainingConfig) -> str:
    """Return the base model's name for others: a hub id as it is, of a folder only the last part."""
    return public_name(config.pretrained_model_name_or_path)


def public_name(name: str) -> str:
    """Return the name of a model or of its configs for others: a hub id as it is, of a folder only the last part."""
    return name if is_on_hub(name) else Path(name).name


def is_on_hub(name: str) -> bool:
    """Return whether a base model's name is a hub id."""
    return name not in BUNDLED_MODELS and not Path(name).expanduser().exists()


def split_by_token(files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Mapping[str, Tensor]]:
    """Return weight files with each of several placeholder tokens in a file of its own.

    Stock diffusers reads one token from a file. A single token stays in `EMBEDS`.

    Args:
        files: File name to tensors by name.
    """
    tokens = files.get(EMBEDS, {})
    if len(tokens) < 2:
        return dict(files)
    split: dict[str, Mapping[str, Tensor]] = {}
    for token, vectors in tokens.items():
        name = of_token(token)
        split[of_token(f"{token}_{len(split)}") if name in split else name] = {token: vectors}
    return {**split, **{name: tensors for name, tensors in files.items() if name != EMBEDS}}
