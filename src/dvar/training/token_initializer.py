"""The initializer tokens of a run: given, drawn, or found by a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from dvar.config.templates import TEMPLATES
from dvar.config.training import BUNDLED_MODEL, TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.clip import Clip
from dvar.diffusion.randomness import generator, seed_for
from dvar.files import read_json, write_json
from dvar.training.dataset import Concept
from dvar.training.placeholder_tokens import token_id
from dvar.training.run_layout import INITIALIZER
from dvar.training.run_schemas import INITIALIZERS

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

SENTENCES, LISTED = 4, 10
"""The sentences around each word when a CLIP scores it, and how many of the best and the worst words are listed."""


def initial_rows(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, initializer_token: str, count: int) -> Tensor:
    """Return ``count`` copies of the embedding of the initializer token, float32 [count, dim].

    No noise is added: the copies stand at different places of a prompt, so their gradients part them from the first
    step.

    Source: Section 2.3; the first vector is that of a known word, as in Textual Inversion.
    """
    embedding = text_encoder.get_input_embeddings()
    ids = torch.tensor([token_id(tokenizer, initializer_token)], device=text_encoder.device)
    with torch.no_grad():
        vectors: Tensor = embedding(ids).float()
    return vectors.repeat(count, 1)


def choose_initializer_tokens(
    config: TrainingConfig, concept: Concept, backbone: Backbone, clip: Clip | None = None
) -> TrainingConfig:
    """Return ``config`` with an ``initializer_token`` for each placeholder token, chosen as its ``initializer`` says.

    The choice is written into the run's folder, and by a CLIP the best and the worst words with their scores.

    Args:
        config: The config of the run.
        concept: What it learns from.
        backbone: The base model, untouched.
        clip: What `load_clip` returned; by default it is called here where it is needed.

    Source: The paper's first version: a word drawn from the vocabulary, or the one that scores best or worst by CLIP
        over four sentences.
    """
    tokens = concept.placeholder_tokens
    if config.initializer == "manual" or not tokens:
        return config
    words = list_words(backbone.tokenizer)
    choices: list[dict[str, Any]]
    if config.initializer == "random":
        keys = [seed_for(config.seed, "initializer", 0, number) for number in range(len(tokens))]
        choices = [{"initializer_token": words[key % len(words)]} for key in keys]
    else:
        clip = clip or load_clip(config, backbone)
        choices = [_find_extreme(clip, words, concept, token, config) for token in tokens]
        choices = [{**choice, "clip": config.clip_model or BUNDLED_MODEL} for choice in choices]
    folder = Path(config.output_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"word": token, **choice} for token, choice in zip(tokens, choices, strict=True)]
    write_json(folder / INITIALIZER, rows)
    return replace(config, initializer_token="+".join(choice["initializer_token"] for choice in choices))


def load_clip(config: TrainingConfig, backbone: Backbone) -> Clip:
    """Return the CLIP that ``config`` names, or that of the bundled model, which is ``backbone``, untouched."""
    return Clip.load(Path(config.clip_model).expanduser()) if config.clip_model else Clip.bundled(backbone)


def describe_initializers(folder: Path) -> list[str]:
    """Return a sentence for each placeholder token of the run in ``folder`` whose initializer token was chosen."""
    path = folder / INITIALIZER
    sentences = []
    for choice in read_json(path, INITIALIZERS) if path.exists() else ():
        sentence = f"{choice['word']} from {choice['initializer_token']}"
        if "best" in choice:
            best, worst = (list(choice[part].items()) for part in ("best", "worst"))
            ends = {"best": best[0], "worst": worst[-1]}
            chosen, other = ("worst", "best") if choice["initializer_token"] == ends["worst"][0] else ("best", "worst")
            sentence += f", by CLIP the {chosen} word with {ends[chosen][1]:.3f}"
            sentence += f"; the {other} is {ends[other][0]} with {ends[other][1]:.3f}"
        sentences.append(sentence)
    return sentences


def list_words(tokenizer: CLIPTokenizer) -> list[str]:
    """Return every entry of the vocabulary from which a placeholder token can start, in the order of their ids.

    A whole word stands without the mark of its end, a piece that only begins or continues words as it is.

    Deviates: The first version draws from all entries; left out here are pieces that are spelled as a whole word is,
        entries with a plus, which joins words in a config, and the marks of a text's start and end.
    """
    special, words = {*tokenizer.all_special_ids}, []
    for entry, index in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        names = [name for name in (entry.removesuffix("</w>"), entry) if token_id(tokenizer, name) == index]
        if names and index not in special and "+" not in entry:
            words.append(names[0])
    return words


def score_words(clip: Clip, words: Sequence[str], sentences: Sequence[str], images: Sequence[Image.Image]) -> Tensor:
    """Return for each word the mean cosine of the ``sentences`` around it and the ``images``, float32 [words].

    Source: The first version's choice by CLIP.
    Deviates: Each sentence meets each image; there they are paired off.
    """
    image_mean = clip.embed_images(images).mean(dim=0)
    cosines = [clip.embed_texts([sentence.format(word) for word in words]) @ image_mean for sentence in sentences]
    return torch.stack(cosines).mean(dim=0)


def _find_extreme(
    clip: Clip, words: Sequence[str], concept: Concept, token: str, config: TrainingConfig
) -> dict[str, Any]:
    """Return the best word for the images of ``token``, or the worst, with the scores of the best and the worst."""
    templates = TEMPLATES[config.learnable_property]
    order = torch.randperm(len(templates), generator=generator(config.seed, "initializer"))[:SENTENCES]
    sentences = [templates[index] for index in order]
    images = [
        image for index, image in enumerate(concept.images) if any(token in text for text in concept.texts(index))
    ]
    scores = score_words(clip, [word.removesuffix("</w>") for word in words], sentences, images)
    ranking = scores.argsort(descending=True, stable=True).tolist()
    best, worst = (
        {words[index]: float(scores[index]) for index in part} for part in (ranking[:LISTED], ranking[-LISTED:])
    )
    chosen = words[ranking[-1 if config.initializer == "clip-worst" else 0]]
    return {"initializer_token": chosen, "sentences": sentences, "best": best, "worst": worst}
