"""The placeholder tokens of a config, checked against the tokenizer of its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import load_long_tokenizer, load_tokenizer
from dvar.diffusion.source import ModelSource
from dvar.errors import nearest

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")
"""How a caption starts when its image is shown much smaller, or larger, than it is."""


class Tokenizer(Protocol):
    """The part of a tokenizer that the checks use; those of transformers have it."""

    model_max_length: int
    unk_token_id: int | None

    def get_vocab(self) -> dict[str, int]:
        """Return the id of each entry of the vocabulary."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of ``text``."""
        ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Return the entries of the vocabulary with these ids."""
        ...


def load_tokenizer_of(config: TrainingConfig) -> Tokenizer:
    """Return the tokenizer of the base model of ``config``; torch is not imported for it.

    Raises:
        ModelError: There is none.
    """
    tokenizer: Tokenizer = load_tokenizer(ModelSource.of(config))
    return tokenizer


def load_long_tokenizer_of(config: TrainingConfig) -> Tokenizer | None:
    """Return the tokenizer of the text encoder of ``config`` that reads what its CLIPs cut off, if it has one.

    Raises:
        ModelError: It cannot be read.
    """
    tokenizer: Tokenizer | None = load_long_tokenizer(ModelSource.of(config))
    return tokenizer


def problems(
    config: TrainingConfig,
    tokenizer: Tokenizer,
    captions: Mapping[str, str],
    long_tokenizer: Tokenizer | None = None,
) -> list[str]:
    """Return what is wrong, by ``tokenizer``, with the placeholder tokens, the initializer tokens and the captions.

    Args:
        config: The config of the run.
        tokenizer: The tokenizer of its base model.
        captions: The captions of its images, by the name of what they belong to.
        long_tokenizer: The tokenizer of a text encoder that reads what that of ``tokenizer`` cuts off, if it has one.
    """
    texts = {**captions, "validation_prompt": config.sample_prompt}
    if config.instance_prompt:
        texts["instance_prompt"] = config.instance_prompt
    return [
        *_placeholder_problems(config, tokenizer),
        *_initializer_problems(config, tokenizer),
        *(problem for text in texts.items() for problem in _length_problems(config, tokenizer, *text, long_tokenizer)),
    ]


def _placeholder_problems(config: TrainingConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the placeholder tokens that the tokenizer knows already."""
    for token in config.placeholder_tokens:
        names = token_names(token, config.num_vectors)
        if existing := [name for name in names if token_id(tokenizer, name) is not None]:
            message = f"placeholder_token must be a new word, and the model already knows {', '.join(existing)}"
            yield f"{message}: try '<my-{token.strip('<>')}>'"


def _initializer_problems(config: TrainingConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the initializer tokens that are spelled with several tokens."""
    if not config.initializer_token or config.initializer != "manual":
        return
    for token in config.initializer_tokens:
        if token_id(tokenizer, token) is None:
            pieces = _pieces(tokenizer, token)
            message = f"initializer_token must be one token, got {token!r}, which is {len(pieces)}: {' '.join(pieces)}"
            near = _single_token(tokenizer, token)
            yield f"{message}; try {near}" if near else f"{message}; try a more common word for the kind of thing it is"


def _length_problems(
    config: TrainingConfig, tokenizer: Tokenizer, name: str, text: str, long_tokenizer: Tokenizer | None
) -> Iterator[str]:
    """Yield what is too long in a text: the whole, or what stands before a new word where another encoder reads on."""
    prefixes = ("", *FAR, *NEAR) if config.random_rescale and name != "validation_prompt" else ("",)
    most, reader = tokenizer.model_max_length, long_tokenizer or tokenizer
    if long_tokenizer:
        length = max(len(long_tokenizer.encode(prefix + text)) for prefix in prefixes)
        for token in config.placeholder_tokens:
            start = text[: text.rfind(token) + len(token)] if token in text else ""
            if _count_tokens(config, tokenizer, start, prefixes) > most:
                message = f"the text of {name} must have {token} in the {most} tokens that its encoder reads"
                yield f"{message}: put it nearer to the beginning"
    else:
        length = _count_tokens(config, tokenizer, text, prefixes)
    if length > reader.model_max_length:
        yield f"the text of {name} must be at most {reader.model_max_length} tokens, got {length}: shorten it"


def _count_tokens(config: TrainingConfig, tokenizer: Tokenizer, text: str, prefixes: Sequence[str]) -> int:
    """Return the tokens of a text after the longest prefix, each new word counted by its vectors."""
    known_part, vectors = text, 0
    for token in config.placeholder_tokens:
        known_part, vectors = known_part.replace(token, " "), vectors + config.num_vectors * text.count(token)
    return max(len(tokenizer.encode(prefix + known_part)) for prefix in prefixes) + vectors


def token_names(placeholder_token: str, count: int) -> tuple[str, ...]:
    """Return the tokens of ``count`` vectors, as stock diffusers names them: <thing>, <thing>_1, ..."""
    return placeholder_token, *(f"{placeholder_token}_{index}" for index in range(1, count))


def token_id(tokenizer: Tokenizer, word: str) -> int | None:
    """Return the id of the single token that is ``word``, or None when it is spelled with several.

    An entry of the vocabulary that only continues words counts too: the released commands start from such a one, ktn.
    """
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    return tokenizer.get_vocab().get(word)


def _pieces(tokenizer: Tokenizer, word: str) -> list[str]:
    """Return the tokens with which ``word`` is spelled."""
    ids = tokenizer.encode(word, add_special_tokens=False)
    return [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]


def _single_token(tokenizer: Tokenizer, text: str) -> str:
    """Return a word near ``text`` that is one token: the last of several words, or one that is spelled much alike."""
    last = (text.lower().split() or [""])[-1]
    if last != text and token_id(tokenizer, last) is not None:
        return last
    entries = list(tokenizer.get_vocab())
    # CLIP marks the end of a word; BERT marks what continues one, so whole words are letters alone.
    words = [entry.removesuffix("</w>") for entry in entries if entry.endswith("</w>")] or entries
    return nearest(last, [word for word in words if word.isalpha() and word[0] == last[:1]] or words)
