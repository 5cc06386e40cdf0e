"""The tokenizer of a model, read by itself and without torch, so that words are checked before anything slow."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar import mini
from dvar.config.training import BUNDLED_MODEL
from dvar.errors import ModelError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


def load_tokenizer(name: str | Path) -> CLIPTokenizer:
    """Return the tokenizer of the model in a diffusers folder or behind a hub id.

    Raises: ModelError when there is none, or when the model is no Stable Diffusion.
    """
    import transformers
    from transformers.utils import cached_file

    with _quiet(transformers):
        try:
            index: Any = json.loads(Path(str(cached_file(name, "model_index.json"))).read_text(encoding="utf-8"))
            check_make(name, index["_class_name"])
            tokenizer = transformers.CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{name} does not load as a Stable Diffusion model: {said}") from error
    # Without files transformers makes up an empty vocabulary; a real one spells at least the 256 bytes.
    if len(tokenizer) < 256:
        raise ModelError(f"{name} does not load as a Stable Diffusion model: its tokenizer has no vocabulary")
    return tokenizer


def check_make(name: str | Path, kind: object) -> None:
    """Raise ModelError unless ``kind``, the pipeline that a model says it is, is one that can be trained here."""
    if kind != "StableDiffusionPipeline":
        raise ModelError(f"the model must be a Stable Diffusion 1.x or 2.x, {name} is a {kind}: choose another")


@contextmanager
def _quiet(library: Any) -> Iterator[None]:
    level = library.logging.get_verbosity()
    library.logging.set_verbosity_error()
    try:
        yield
    finally:
        library.logging.set_verbosity(level)


def model_path(name: str) -> str:
    """Return the folder or hub id behind a model's name: "mini" is the bundled model."""
    return str(mini.path()) if name == BUNDLED_MODEL else os.path.expanduser(name)
