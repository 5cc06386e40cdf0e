"""Placeholder and initializer tokens as a tokenizer reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dvar.config.methods import DreamBoothLoraConfig, TextualInversionConfig
from dvar.testing import tiny_tokenizer
from dvar.training.placeholder_tokens import problems, token_id

CONFIG = TextualInversionConfig(initializer_token="mug")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_all_tokens_of_several_vectors_must_be_new() -> None:
    tokenizer = tiny_tokenizer(["mug"])
    tokenizer.add_tokens(["<thing>_2"])
    assert problems(replace(CONFIG, num_vectors=2), tokenizer, {}) == []
    (problem,) = problems(replace(CONFIG, num_vectors=3), tokenizer, {})
    assert "already knows <thing>_2" in problem


def test_a_caption_of_exactly_the_maximum_length_is_accepted(tokenizer: Any) -> None:
    # 77 places: the start, the end, and 75 between them, of which two are the placeholder's.
    full = replace(CONFIG, num_vectors=2)
    assert problems(full, tokenizer, {"00.png": "a " * 73 + "<thing>"}) == []
    (problem,) = problems(full, tokenizer, {"00.png": "a " * 74 + "<thing>"})
    assert "the text of 00.png must be at most 77 tokens, got 78" in problem


def test_a_caption_is_as_long_as_the_longest_reader_takes(tokenizer: Any) -> None:
    """CLIP reads 77 tokens with its two marks, and must read the new word; another encoder reads the rest."""
    reader = tiny_tokenizer()
    reader.model_max_length = 100
    assert problems(CONFIG, tokenizer, {"00.png": "a " * 74 + "<thing>" + " a" * 10}, reader) == []
    (problem,) = problems(CONFIG, tokenizer, {"00.png": "a " * 76 + "<thing>"}, reader)
    assert problem == (
        "the text of 00.png must have <thing> in the 77 tokens that its encoder reads: put it nearer to the beginning"
    )
    (problem,) = problems(CONFIG, tokenizer, {"00.png": "<thing>" + " a" * 110}, reader)
    assert "the text of 00.png must be at most 100 tokens, got" in problem
    lora = DreamBoothLoraConfig(instance_prompt="a " * 90)
    assert problems(lora, tokenizer, {}, reader) == []
    assert len(problems(lora, tokenizer, {})) == 2  # the prompt of the samples, too


def test_an_initializer_may_be_a_token_that_is_not_a_word(tokenizer: Any) -> None:
    # In CLIP's vocabulary ktn only continues words: as a word of its own it is two tokens, yet it is an entry.
    spelled = tiny_tokenizer(["ktnx"])
    entries = spelled.get_vocab()
    inner = next(entry for entry in entries if len(entry) > 1 and not entry.endswith("</w>") and entry.isalpha())
    assert len(spelled.encode(inner, add_special_tokens=False)) > 1
    assert token_id(spelled, inner) == entries[inner]
    assert token_id(tokenizer, "ktn") == tokenizer.get_vocab()["ktn</w>"]


def test_a_string_of_several_tokens_has_no_token_id(tokenizer: Any) -> None:
    assert token_id(tokenizer, "zzzz") is None
    assert token_id(tokenizer, "") is None


def test_an_unknown_string_has_no_token_id() -> None:
    class Small:
        model_max_length: int = 77
        unk_token_id: int | None = 7

        def get_vocab(self) -> dict[str, int]:
            return {"mug</w>": 0, "<unknown>": 7}

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [0 if text == "mug" else 7]

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["<unknown>"]

    assert token_id(Small(), "mug") == 0
    assert token_id(Small(), "vase") is None
