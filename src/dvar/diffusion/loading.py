"""Scopes in which models are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import transformers
from safetensors import SafetensorError

from dvar.errors import ModelError, first_line


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and messages of diffusers and transformers in a scope."""
    levels = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers.logging.set_verbosity(levels[1])
        transformers.logging.enable_progress_bar()
        diffusers.logging.enable_progress_bar()


@contextmanager
def loading_errors(name: str | Path, kind: str) -> Iterator[None]:
    """Load a model of some ``kind`` in a scope: silence the libraries, and turn their errors into a `ModelError`."""
    try:
        with quiet_libraries():
            yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{name} does not load as a {kind}: {first_line(error)}") from error
