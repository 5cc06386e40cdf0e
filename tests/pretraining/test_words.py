"""The tokenizer: every word of the world is one token, and every caption fits."""

from __future__ import annotations

import numpy as np

from dvar.mini.world.captions import caption, facts
from dvar.mini.world.classes import WORDS
from dvar.mini.world.concepts import sample_trained_subject
from dvar.mini.world.scene import COLOURS, sample_scene
from pretraining.words import LENGTH, build_tokenizer


def test_words_are_single_tokens_and_captions_fit() -> None:
    tokenizer = build_tokenizer()
    words = {"a", "ktn", "pll", "ucd", "sks", *COLOURS, *WORDS}
    for entry in WORDS.values():
        words |= {entry.accent, *(word for p in entry.shape if p for word in (p.low, p.high, p.part or "a"))}
    assert {word: tokens for word in words if len(tokens := tokenizer.tokenize(word)) != 1} == {}
    rng = np.random.default_rng(3)
    texts = [caption(facts(sample_trained_subject(rng), sample_scene(rng)), rng)[0] for _ in range(6000)]
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    assert 20 < max(lengths) <= LENGTH
