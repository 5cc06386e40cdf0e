"""How good pictures are: like the references and like what was asked (CLIP, DINO), and on the bundled model what its
own judge sees.

A score is a number a picture, so that means, spreads and halves can be taken later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from dvar import mini
from dvar.diffusion.backbone import best_device
from dvar.diffusion.clip import Clip, embedded, loading, sizes_differ, unit
from dvar.errors import ModelError, RefusedInput

Pairing = Literal["all pairs", "row by row"]
PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)
DISTRACTORS = 99


def similarity(of: Tensor, to: Tensor, pairing: Pairing = "all pairs") -> Tensor:
    """Return the cosine of each of the vectors ``of`` [n, d] with those it is held against, ``to`` [m, d]: float32 [n].

    "all pairs" is the mean over all of ``to``; "row by row" takes row i mod m alone.

    Source: the paper says "CLIP image-to-image similarity"; all pairs is what Textual Inversion and Custom Diffusion
    publish, row by row what the released code computes.
    """
    cosines = unit(of) @ unit(to).T
    if pairing == "all pairs":
        return cosines.mean(dim=1)
    rows = torch.arange(len(of))
    return cosines[rows, rows % len(to)]


@dataclass(frozen=True)
class Dino:
    """A DINO: a vision transformer whose first output, that of the class token, tells individuals apart.

    Source: the metric of DreamBooth, ViT-S/16.
    Deviates: pixels are made as the model's own processor says; that paper's code resizes to 256 and crops 224.
    """

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path, *, device: str | None = None) -> Dino:
        """Return the model in a folder or behind a hub id, in float32.

        Raises: ModelError when it cannot be loaded, or its processor makes pictures of another size.
        """
        with loading(name, "DINO"):
            processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
            model = AutoModel.from_pretrained(name, dtype=torch.float32)
            size = model.config.image_size
        if problems := sizes_differ(processor, size):
            raise ModelError(f"{name} does not fit: {'; '.join(problems)}: complete the folder or name another DINO")
        return cls(Path(name).name, model.to(device or best_device()).eval().requires_grad_(False), processor)

    def of_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return the unit vectors of RGB pictures of any size, float32 [n, d] on the CPU."""

        def embed(pixels: Tensor) -> Tensor:
            return self.model(pixel_values=pixels).last_hidden_state[:, 0]

        return embedded(pictures, self.processor, embed, self.model.device)


class Judge:
    """The bundled recogniser, told which concept it is to look for; distractors of its class are drawn once.

    Raises: RefusedInput when the concept is not bundled, or what draws the bundled world is not installed.
    """

    def __init__(self, concept: str) -> None:
        try:
            from dvar.mini import recogniser
            from dvar.mini.world.classes import CLASSES
            from dvar.mini.world.concepts import held_out
            from dvar.mini.world.places import PLACES
            from dvar.mini.world.scene import COLOURS, PATTERNS, sample_subject
        except ModuleNotFoundError as error:
            raise RefusedInput(
                [f"the judge of the bundled model needs {error.name}: pip install 'dvar[world]'"]
            ) from error
        if concept not in held_out():
            raise RefusedInput(
                [f"the bundled judge knows the bundled concepts alone, got {concept!r}: see dvar concepts"]
            )
        subject, rng = held_out()[concept], np.random.default_rng([7, list(held_out()).index(concept)])
        others = np.stack([sample_subject(rng, subject.noun).vector() for _ in range(DISTRACTORS)])
        self._model = recogniser.load(mini.judges() / "recogniser.safetensors")
        self._own, self._others = torch.from_numpy(subject.vector()).float(), torch.from_numpy(others).float()
        self._class, self._places = list(CLASSES).index(subject.noun), list(PLACES)
        self._right = {
            "class": self._class,
            "main colour": list(COLOURS).index(subject.colours[0]),
            "pattern": PATTERNS.index(subject.pattern),
        }

    @torch.no_grad()
    def scores(self, pictures: Sequence[Image.Image], places: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return by name, [n] each: ``identity``, the probability that the subject is this one rather than another of
        its class (1/2 is chance); ``class``, ``main colour`` and ``pattern``, 1 where read right and else 0; and
        ``place`` likewise, where the ``places`` that were asked for are given.
        """
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
        reading = self._model((pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous())
        found = {"identity": reading.identity(self._own, self._others, self._class)}
        found |= {head: (reading.best(head) == answer).float() for head, answer in self._right.items()}
        if places is not None:
            asked = torch.tensor([self._places.index(place) for place in places])
            found["place"] = (reading.best("place") == asked).float()
        return found


class Scorer:
    """Scores pictures of one concept by all judges there are; the vectors of the references are computed once, here."""

    def __init__(
        self,
        clip: Clip,
        references: Sequence[Image.Image],
        *,
        pairing: Pairing = "all pairs",
        dino: Dino | None = None,
        judge: Judge | None = None,
    ) -> None:
        if pairing not in PAIRINGS:
            raise RefusedInput([f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}"])
        if not references:
            raise RefusedInput(["there must be a reference to hold pictures against, got none: name a concept"])
        self.pairing, self.clip, self.dino, self.judge = pairing, clip, dino, judge
        self._clip_references = clip.of_pictures(references)
        self._dino_references = dino.of_pictures(references) if dino else None

    @property
    def names(self) -> dict[str, str]:
        """Who judges, for the header of a table."""
        others = {"dino": self.dino.name} if self.dino else {}
        return {"clip": self.clip.name, **others, **({"recogniser": "the bundled recogniser"} if self.judge else {})}

    def __call__(
        self, pictures: Sequence[Image.Image], texts: Sequence[str], places: Sequence[str] | None = None
    ) -> dict[str, list[float]]:
        """Return by metric a score for each picture, which was drawn for the text of the same number.

        ``clip_image`` and, with a DINO, ``dino``: cosine with the references, paired as said; ``clip_text``: cosine
        with the picture's own text; with a judge, all of `Judge.scores`.

        Source: Section 4.1, "Train CLIP img" and "Val CLIP txt".
        """
        seen = self.clip.of_pictures(pictures)
        scores = {
            "clip_image": similarity(seen, self._clip_references, self.pairing),
            "clip_text": similarity(seen, self.clip.of_texts(texts), "row by row"),
        }
        if self.dino and self._dino_references is not None:
            scores["dino"] = similarity(self.dino.of_pictures(pictures), self._dino_references, self.pairing)
        if self.judge:
            scores |= self.judge.scores(pictures, places)
        return {name: values.tolist() for name, values in scores.items()}
