"""Batches of freshly drawn pictures; batch ``index`` of stream ``seed`` is the same whenever and wherever drawn."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from dvar.mini.world.captions import caption, facts
from dvar.mini.world.concepts import sample_trained_subject
from dvar.mini.world.scene import Scene, Subject, render, sample_scene, silhouette


@dataclass(frozen=True)
class Pictures:
    """uint8 pictures [n, 64, 64, 3], the facts of each [n, 15], and what was drawn."""

    pixels: np.ndarray
    facts: np.ndarray
    subjects: list[Subject]
    scenes: list[Scene]

    def masks(self) -> np.ndarray:
        """float32 [n, 64, 64]: where the subject is."""
        return np.stack([silhouette(s, c) for s, c in zip(self.subjects, self.scenes, strict=True)])


def draw_pictures(seed: int, index: int, n: int, style: str | None = None) -> Pictures:
    rng = np.random.default_rng([seed, index])
    subjects = [sample_trained_subject(rng) for _ in range(n)]
    scenes = [sample_scene(rng, style=style) for _ in range(n)]
    pixels = np.stack([render(s, c) for s, c in zip(subjects, scenes, strict=True)])
    return Pictures(pixels, np.stack([facts(s, c) for s, c in zip(subjects, scenes, strict=True)]), subjects, scenes)


def as_tensor(pixels: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """uint8 [n, 64, 64, 3] as networks take it: float32 [n, 3, 64, 64] in [-1, 1]."""
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)


def fingerprint(seed: int) -> str:
    """sha256 over the first 64 pictures of a stream and their facts: another world, another hash."""
    first = draw_pictures(seed, 0, 64)
    return sha256(first.pixels.tobytes() + first.facts.tobytes()).hexdigest()


def captions_for(truths: np.ndarray, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """One caption for each picture, and what each mentions [n, 15]."""
    pairs = [caption(truth, rng) for truth in truths]
    return [text for text, _ in pairs], np.stack([mentioned for _, mentioned in pairs])
