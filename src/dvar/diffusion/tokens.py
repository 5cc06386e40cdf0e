"""The tokenizer of a base model, loaded without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar.diffusion.source import ModelSource, as_source
from dvar.errors import ModelError, first_line
from dvar.files import read_json

if TYPE_CHECKING:
    from transformers import BertTokenizer, CLIPTokenizer

LANGUAGE_MODEL_TEXT = 480
"""Tokens of a prompt that fit into the 512 of a language model beside the template."""


def read_index(name: str | Path | ModelSource) -> dict[str, Any]:
    """Return what a model's model_index.json says: the class of its pipeline, and those of its parts.

    Raises:
        ModelError: There is no such model.
    """
    with _tokenizer_errors(str(name)):
        index: dict[str, Any] = read_json(as_source(name).config_folder / "model_index.json", {"_class_name": str})
    return index


def load_clip_tokenizer(name: str | Path) -> CLIPTokenizer:
    """Return the CLIP tokenizer of the model in a diffusers folder or behind a hub id.

    Raises:
        ModelError: There is none.
    """
    from transformers import CLIPTokenizer

    with _tokenizer_errors(name):
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder="tokenizer")
    # Without files transformers makes up an empty vocabulary; a real one spells at least the 256 bytes.
    if len(tokenizer) < 256:
        raise ModelError(f"{name} does not load as a Stable Diffusion model: its tokenizer has no vocabulary")
    return tokenizer


def load_bert_tokenizer(name: str | Path) -> BertTokenizer:
    """Return the BERT tokenizer of the model in a diffusers folder or behind a hub id.

    Raises:
        ModelError: There is none.
    """
    from transformers import BertTokenizer

    with _tokenizer_errors(name, "Latent Diffusion"):
        tokenizer = BertTokenizer.from_pretrained(name, subfolder="tokenizer", model_max_length=77)
    _check_vocabulary(name, tokenizer, "Latent Diffusion")
    return tokenizer


def load_language_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of a language model that is a text encoder, in a diffusers folder or behind a hub id.

    Raises:
        ModelError: There is none.
    """
    from transformers import AutoTokenizer

    with _tokenizer_errors(name, "base"):
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", model_max_length=LANGUAGE_MODEL_TEXT)
    _check_vocabulary(name, tokenizer, "base")
    return tokenizer


def load_long_tokenizer(name: str | Path, folder: str, length: int) -> Any:
    """Return the tokenizer in a folder of a model whose encoder reads ``length`` tokens; None where it has none.

    Raises:
        ModelError: It cannot be read.
    """
    from transformers import AutoTokenizer

    if not (Path(name) / folder).is_dir():
        return None
    with _tokenizer_errors(name, "base"):
        return AutoTokenizer.from_pretrained(name, subfolder=folder, model_max_length=length)


def _check_vocabulary(name: str | Path, tokenizer: Any, kind: str) -> None:
    """Raise a `ModelError` if transformers made up an empty vocabulary, as it does without files."""
    if len(tokenizer) < 128:  # a real one spells at least the letters
        raise ModelError(f"{name} does not load as a {kind} model: its tokenizer has no vocabulary")


@contextmanager
def _tokenizer_errors(name: str | Path, kind: str = "Stable Diffusion") -> Iterator[None]:
    """Read a part of a model in a scope: silence transformers, and turn errors into a `ModelError`."""
    from transformers import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"{name} does not load as a {kind} model: {first_line(error)}") from error
    finally:
        logging.set_verbosity(level)
