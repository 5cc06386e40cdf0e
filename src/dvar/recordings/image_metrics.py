"""Metrics of generated images: similarity to references and prompts (CLIP, DINO), and what the bundled judge sees."""

# A metric gives each image a score of its own, so that means, spreads and halves can be computed later.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModel

from dvar import mini
from dvar.diffusion.clip import Clip, embed_in_batches, normalize
from dvar.diffusion.devices import best_device
from dvar.diffusion.loading import loading_errors
from dvar.errors import ModelError, RefusedInput
from dvar.recordings.lpips import Lpips
from dvar.recordings.protocol import PAIRINGS, Pairing

DISTRACTORS = 99


def similarity(of: Tensor, to: Tensor, pairing: Pairing = "all pairs") -> Tensor:
    """Return the cosine similarity of each vector to those it is compared with, float32 [n].

    Args:
        of: Vectors, [n, d].
        to: What they are compared with, [m, d].
        pairing: "all pairs" is the mean over all of ``to``; "row by row" compares row i with row i mod m.

    Source: the paper says "CLIP image-to-image similarity"; all pairs is what Textual Inversion and Custom Diffusion
    publish, row by row what the released code computes.
    """
    cosines = normalize(of) @ normalize(to).T
    if pairing == "all pairs":
        return cosines.mean(dim=1)
    rows = torch.arange(len(of))
    return cosines[rows, rows % len(to)]


@dataclass(frozen=True)
class Dino:
    """A DINO: a vision transformer whose output for the class token distinguishes individuals.

    Source: the metric of DreamBooth, ViT-S/16.
    Deviates: the model's own processor prepares the pixels; that paper's code resizes to 256 and crops 224.
    """

    name: str
    model: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path, *, device: str | None = None) -> Dino:
        """Return the model in a folder or behind a hub id, in float32.

        Raises:
            ModelError: It cannot be loaded, or its processor makes images of another size.
        """
        with loading_errors(name, "DINO"):
            processor = transformers.AutoImageProcessor.from_pretrained(name, backend="pil")
            model = AutoModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)  # and no pickle
            size, patch = model.config.image_size, model.config.patch_size
        height, width = processor(Image.new("RGB", (size + 16, size + 8)), return_tensors="pt").pixel_values.shape[-2:]
        # DINOv2 is trained at another size than its processor's, and interpolates the positions of its patches.
        if height != width or height % patch:
            rule = f"{name} must have a processor that makes squares of whole patches of {patch} pixels"
            raise ModelError(f"{rule}, got {width}x{height}: complete the folder or name another DINO")
        return cls(Path(name).name, model.to(device or best_device()).eval().requires_grad_(False), processor)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the unit vectors of RGB images of any size, float32 [n, d] on the CPU."""

        def embed(pixels: Tensor) -> Tensor:
            vectors: Tensor = self.model(pixel_values=pixels).last_hidden_state[:, 0]
            return vectors

        return embed_in_batches(images, self.processor, embed, self.model.device)


class Judge:
    """The bundled recogniser, looking for one bundled concept among `DISTRACTORS` others of its class.

    Raises:
        RefusedInput: The concept is not bundled, or what renders the bundled world is not installed.
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
        self._answers = {
            "class": self._class,
            "main colour": list(COLOURS).index(subject.colours[0]),
            "pattern": PATTERNS.index(subject.pattern),
        }

    @torch.no_grad()
    def scores(self, images: Sequence[Image.Image], places: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Return the judge's scores of images, [n] each, by name.

        Args:
            places: The place that each prompt names.

        Returns:
            "identity", the probability that the subject is this one rather than another of its class (1/2 is chance);
            "class", "main colour" and "pattern", 1 where they are recognised right and 0 elsewhere; with ``places``
            also "place".
        """
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        recognition = self._model((pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous())
        scores = {"identity": recognition.identity(self._own, self._others, self._class)}
        scores |= {head: (recognition.best(head) == answer).float() for head, answer in self._answers.items()}
        if places is not None:
            answers = torch.tensor([self._places.index(place) for place in places])
            scores["place"] = (recognition.best("place") == answers).float()
        return scores


class Scorer:
    """Scores images of one concept by every judge there is.

    Args:
        references: Images of the concept; their vectors are computed once.

    Raises:
        RefusedInput: The pairing is unknown, or there is no reference.
    """

    def __init__(
        self,
        clip: Clip,
        references: Sequence[Image.Image],
        *,
        pairing: Pairing = "all pairs",
        dino: Dino | None = None,
        judge: Judge | None = None,
        lpips: Lpips | None = None,
    ) -> None:
        if pairing not in PAIRINGS:
            raise RefusedInput([f"pairing must be one of {', '.join(PAIRINGS)}, got {pairing!r}"])
        if not references:
            raise RefusedInput(["there must be a reference to compare images with, got none: name a concept"])
        self.pairing, self.clip, self.dino, self.judge, self.lpips = pairing, clip, dino, judge, lpips
        self.references = len(references)
        self._clip_references = clip.embed_images(references)
        self._dino_references = dino.embed_images(references) if dino else None

    @property
    def names(self) -> dict[str, str]:
        """The judges, for the header of a table."""
        others = {"dino": self.dino.name} if self.dino else {}
        others |= {"lpips": self.lpips.name} if self.lpips else {}
        return {"clip": self.clip.name, **others, **({"recogniser": "the bundled recogniser"} if self.judge else {})}

    def __call__(
        self, images: Sequence[Image.Image], texts: Sequence[str], places: Sequence[str] | None = None
    ) -> dict[str, list[float]]:
        """Return a score of each image by each metric.

        Args:
            texts: The text that each image was generated for.
            places: As for `Judge.scores`.

        Returns:
            "clip_image" and, with a DINO, "dino": the similarity to the references; "clip_text": the similarity to the
            image's own text; with an LPIPS, "diversity": the mean distance to the other images of that text, where
            every text has several; with a judge, all of `Judge.scores`.

        Source: Section 4.1, "Train CLIP img" and "Val CLIP txt".
        """
        vectors = self.clip.embed_images(images)
        scores = {
            "clip_image": similarity(vectors, self._clip_references, self.pairing),
            "clip_text": similarity(vectors, self.clip.embed_texts(texts), "row by row"),
        }
        if self.dino and self._dino_references is not None:
            scores["dino"] = similarity(self.dino.embed_images(images), self._dino_references, self.pairing)
        if self.lpips and (diversity := self.lpips.diversity(images, texts)) is not None:
            scores["diversity"] = diversity
        if self.judge:
            scores |= self.judge.scores(images, places)
        return {name: values.tolist() for name, values in scores.items()}
