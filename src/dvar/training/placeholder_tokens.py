"""The new words as a model's tokenizer reads them, and those they start from; what is wrong is told before training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dvar.config.training import (
    AnyConfig,
    CustomDiffusionConfig,
    TextualInversionConfig,
    initializers,
    sample_prompt,
    words,
)
from dvar.diffusion.tokens import model_path
from dvar.errors import nearest

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")
"""What a caption begins with when its picture is shown much smaller, or larger, than it is."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer here; those of transformers have it."""

    model_max_length: int
    unk_token_id: int | None

    def get_vocab(self) -> dict[str, int]: ...
    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


def tokenizer_of(name: str) -> Tokenizer:
    """Return the tokenizer of the model of this name.

    Raises: ModelError.
    """
    from dvar.diffusion.tokens import load_tokenizer

    return load_tokenizer(model_path(name))


def word_problems(config: AnyConfig, tokenizer: Tokenizer, captions: Mapping[str, str]) -> list[str]:
    """What is wrong, as this tokenizer reads, with the new words, those they start from, and the captions' length.

    ``captions`` are by the name of what they belong to, as a rule a picture.
    """
    count, new = config.num_vectors, words(config)
    problems = []
    for word in new:
        if known := [name for name in token_names(word, count) if token_id(tokenizer, name) is not None]:
            said = f"placeholder_token must be a new word, and the model already knows {', '.join(known)}"
            problems.append(f"{said}: try '<my-{word.strip('<>')}>'")
    for word in initializers(config) if config.initializer_token and config.initializer == "manual" else ():
        if token_id(tokenizer, word) is None:
            pieces = _pieces(tokenizer, word)
            said = f"initializer_token must be one token, got {word!r}, which is {len(pieces)}: {' '.join(pieces)}"
            problems.append(f"{said}; try {_known_word(tokenizer, word)}")
    texts = {**captions, "validation_prompt": sample_prompt(config)}
    if not isinstance(config, TextualInversionConfig) and config.instance_prompt:
        texts["instance_prompt"] = config.instance_prompt
    rescaled = isinstance(config, CustomDiffusionConfig) and config.random_rescale
    for name, caption in texts.items():
        known_part, vectors = caption, 0
        for word in new:
            known_part, vectors = known_part.replace(word, " "), vectors + count * caption.count(word)
        begins = ("", *FAR, *NEAR) if rescaled and name != "validation_prompt" else ("",)
        length = max(len(tokenizer.encode(begin + known_part)) for begin in begins) + vectors
        if length > tokenizer.model_max_length:
            said = f"the text of {name} must be at most {tokenizer.model_max_length} tokens, got {length}"
            problems.append(f"{said}: shorten it")
    return problems


def token_names(placeholder: str, count: int) -> tuple[str, ...]:
    """The tokens behind a new word of ``count`` vectors, as stock diffusers names them: <thing>, <thing>_1, ..."""
    return placeholder, *(f"{placeholder}_{index}" for index in range(1, count))


def token_id(tokenizer: Tokenizer, word: str) -> int | None:
    """The id of the single token that is ``word``, or None when it is spelled with several.

    An entry of the vocabulary that only continues words counts too: the released commands start from such a one, ktn.
    """
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    return tokenizer.get_vocab().get(word)


def _pieces(tokenizer: Tokenizer, word: str) -> list[str]:
    ids = tokenizer.encode(word, add_special_tokens=False)
    return [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]


def _known_word(tokenizer: Tokenizer, word: str) -> str:
    """A word near ``word`` that is one token: the last of several words, or else the one spelled most alike."""
    last = (word.lower().split() or [""])[-1]
    if last != word and token_id(tokenizer, last) is not None:
        return last
    words = [entry.removesuffix("</w>") for entry in tokenizer.get_vocab() if entry.endswith("</w>")]
    return nearest(last, [known for known in words if known.isalpha() and known[0] == last[:1]] or words)
