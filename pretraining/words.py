"""The tokenizer: byte-level BPE in CLIP's own format, in which every word the book knows is one token."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from dvar.mini.world.captions import PATTERN_SIZES
from dvar.mini.world.classes import CLASSES, WORDS
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import COLOURS, PATTERNS
from pretraining.pictures import captions_for, draw_pictures
from pretraining.training import WORK

LENGTH = 32
"""Tokens in a caption, start and end included; the longest caption of the book has 31."""
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# Words that caption templates and prompts use beside the book's own, and the rare tokens that personalisation
# starts from.
OTHER_WORDS = """
    a an the my your our this that of on in at by with and for to from is are one two three four five no
    not very it its as photo picture image photograph rendering drawing sketch painting illustration
    depiction version shot view close up closeup portrait cropped good bad nice great bright dark clean
    dirty cool weird strange small large big little tiny huge old new blurry sharp soft pretty plain
    single lone simple detailed low high resolution quality style art pixel oil pencil watercolor cartoon
    toy object thing subject front side back top bottom left right red orange yellow green turquoise blue
    purple pink brown white black grey gray gold silver standing sitting lying floating under over behind
    beside near inside outside sun moon star sky water sand mountain city park garden house home kitchen
    room wall floor door window tree rock stone road river lake hill field day night morning evening
    summer winter ktn pll ucd sks
""".split()  # noqa: SIM905


def corpus() -> list[str]:
    pictures = draw_pictures(7, 0, 400)
    rng = np.random.default_rng(7)
    lines = [text for _ in range(20) for text in captions_for(pictures.facts, rng)[0]]
    words = [*OTHER_WORDS, *CLASSES, *COLOURS, *PATTERNS, *PATTERN_SIZES]
    words += " ".join(place.words for place in PLACES.values()).split()
    for known in WORDS.values():
        words.append(known.accent)
        words += " ".join(f"{p.low} {p.high} {p.part}" for p in known.shape if p is not None).split()
    return lines + [word for word in sorted(set(words)) for _ in range(50)]


def build_tokenizer() -> CLIPTokenizer:
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=4000, min_frequency=40, end_of_word_suffix="</w>", show_progress=False)
    learner.train_from_iterator(corpus(), trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), BEGIN, END]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def load_tokenizer() -> CLIPTokenizer:
    """The one tokenizer of all stages, built when first asked for: no two builds break ties among merges alike."""
    folder = WORK / "tokenizer"
    if not folder.exists():
        build_tokenizer().save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
