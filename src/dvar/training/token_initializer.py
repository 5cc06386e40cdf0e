"""The first vectors of a new word: those of a known word, which is given, drawn, or found by a CLIP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dvar.config.training import BUNDLED_MODEL, AnyConfig, CustomDiffusionConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.clip import Clip
from dvar.diffusion.randomness import generator, seed_for
from dvar.files import write_json
from dvar.training.dataset import TEMPLATES, Concept
from dvar.training.placeholder_tokens import token_id
from dvar.training.run_layout import INITIALIZER

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SENTENCES, TOLD = 4, 10


def initial_rows(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, initializer: str, count: int) -> Tensor:
    """Return ``count`` copies of the embedding of the one-token word ``initializer``, float32 [count, dim].

    No noise is added: the copies stand at different places of a prompt, so their gradients part them from the first
    step.

    Source: Section 2.3; the first vector is that of a known word, as in Textual Inversion.
    """
    embedding = text_encoder.get_input_embeddings()
    place = torch.tensor([token_id(tokenizer, initializer)], device=text_encoder.device)
    with torch.no_grad():
        return embedding(place).float().repeat(count, 1)


def first_words(config: AnyConfig, concept: Concept, backbone: Backbone, clip: Clip | None = None) -> AnyConfig:
    """Return ``config`` with an ``initializer_token`` for each new word, as its ``initializer`` says.

    ``clip`` is what `clip_of` returned, where that was called before.  What was chosen, and under "clip" the best and
    the worst words with their scores, is written into the run's folder.

    Source: the paper's first version: a word drawn from the vocabulary, or the one that scores best by CLIP over four
    sentences.
    """
    if config.initializer == "manual" or not concept.words:
        return config
    entries = vocabulary(backbone.tokenizer)
    if config.initializer == "random":
        keys = [seed_for(config.seed, "initializer", 0, number) for number in range(len(concept.words))]
        told: list[dict[str, Any]] = [{"initializer_token": entries[key % len(entries)]} for key in keys]
    else:
        clip = clip or clip_of(config, backbone)
        told = [_best(clip, entries, concept, word, config) for word in concept.words]
        told = [{**each, "clip": config.clip_model or BUNDLED_MODEL} for each in told]
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INITIALIZER, [{"word": word, **each} for word, each in zip(concept.words, told, strict=True)])
    return replace(config, initializer_token="+".join(each["initializer_token"] for each in told))


def clip_of(config: AnyConfig, backbone: Backbone) -> Clip:
    """Return the CLIP that these settings name, or that of the bundled model, ``backbone``, still untouched."""
    return Clip.load(Path(config.clip_model).expanduser()) if config.clip_model else Clip.bundled(backbone)


def told_of(folder: Path) -> list[str]:
    """Return a sentence for each new word of the run in ``folder`` whose first word was drawn or found."""
    path = folder / INITIALIZER
    sentences = []
    for each in json.loads(path.read_text(encoding="utf-8")) if path.exists() else ():
        sentence = f"{each['word']} from {each['initializer_token']}"
        if "best" in each:
            (_, best), (worst, least) = next(iter(each["best"].items())), list(each["worst"].items())[-1]
            sentence += f", by CLIP the best word with {best:.3f}; the worst is {worst} with {least:.3f}"
        sentences.append(sentence)
    return sentences


def vocabulary(tokenizer: CLIPTokenizer) -> list[str]:
    """Return every entry of the vocabulary by which a word can start, in the order of their ids.

    A whole word stands without the mark of its end, a piece that only begins or continues words as it is.
    Deviates: the first version draws from all entries; left out are pieces that are spelled as a whole word is, entries
    with a plus, which joins words here, and the marks of a text's start and end.
    """
    special, found = {*tokenizer.all_special_ids}, []
    for entry, place in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        names = [name for name in (entry.removesuffix("</w>"), entry) if token_id(tokenizer, name) == place]
        if names and place not in special and "+" not in entry:
            found.append(names[0])
    return found


def scores(clip: Clip, words: Sequence[str], sentences: Sequence[str], pictures: Sequence[Image.Image]) -> Tensor:
    """Return for each word the mean cosine of the ``sentences`` around it and the ``pictures``, float32 [words].

    Source: the first version's choice by CLIP.
    Deviates: each sentence meets each picture; there they are paired off.
    """
    subject = clip.of_pictures(pictures).mean(dim=0)
    found = [clip.of_texts([sentence.format(word) for word in words]) @ subject for sentence in sentences]
    return torch.stack(found).mean(dim=0)


def _best(clip: Clip, entries: Sequence[str], concept: Concept, word: str, config: AnyConfig) -> dict[str, Any]:
    """The best word for the pictures that are of ``word``, and what is told of the choice."""
    kind = "object" if isinstance(config, CustomDiffusionConfig) else config.learnable_property
    places = torch.randperm(len(TEMPLATES[kind]), generator=generator(config.seed, "initializer"))[:SENTENCES]
    sentences = [TEMPLATES[kind][place] for place in places]
    shown = [
        picture for index, picture in enumerate(concept.pictures) if any(word in text for text in concept.texts(index))
    ]
    found = scores(clip, [entry.removesuffix("</w>") for entry in entries], sentences, shown)
    order = found.argsort(descending=True, stable=True).tolist()
    best, worst = ({entries[place]: float(found[place]) for place in part} for part in (order[:TOLD], order[-TOLD:]))
    return {"initializer_token": entries[order[0]], "sentences": sentences, "best": best, "worst": worst}
