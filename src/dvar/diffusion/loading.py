"""Scopes in which models are loaded."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import SafetensorError, safe_open

from dvar.errors import ModelError, first_line
from dvar.files import regular_file


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and messages of diffusers and transformers in a scope."""
    levels = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():  # the older name, which all versions of diffusers that are admitted take
            warnings.filterwarnings("ignore", ".torch_dtype. is deprecated", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers.logging.set_verbosity(levels[1])
        transformers.logging.enable_progress_bar()
        diffusers.logging.enable_progress_bar()


@contextmanager
def loading_errors(name: str | Path, kind: str) -> Iterator[None]:
    """Load a model of some ``kind`` in a scope: silence the libraries, and turn their errors into a `ModelError`.

    Memory that ran out is not the model's fault, and stays the error that it is.
    """
    try:
        with quiet_libraries():
            yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{name} does not load as a {kind}: {first_line(error)}") from error


HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
_FLOATS = {*HALVES, "F32", "F64"}


def stored_dtypes(folder: str | Path, parts: Sequence[str]) -> dict[str, torch.dtype]:
    """Return the half precision in which weights of these parts of a model's folder are stored, where all of them are.

    Loaded as they are stored, they take half of the memory and are exact.
    """
    dtypes = {}
    for part in parts:
        kinds = {kind for file in (Path(folder) / part).glob("*.safetensors") for kind in _read_kinds(file)}
        if len(kinds) == 1 and kinds <= HALVES.keys():
            dtypes[part] = HALVES[kinds.pop()]
    return dtypes


def _read_kinds(file: Path) -> set[str]:
    """Return the types of floating-point numbers in a safetensors file."""
    with safe_open(regular_file(file), "pt") as tensors:
        return {tensors.get_slice(name).get_dtype() for name in tensors.keys()} & _FLOATS  # noqa: SIM118 (no mapping)
