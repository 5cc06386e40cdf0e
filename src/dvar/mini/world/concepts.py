"""The 60 held-out subjects that pretraining never sees: 48 for the laboratory and 12 for tuning."""

from __future__ import annotations

from functools import cache

import numpy as np

from dvar.mini.world.classes import CLASSES
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import Scene, Subject, sample_scene, sample_subject

TUNING = 12
LABORATORY = 48
RADIUS = 0.7
"""Subjects closer than this to a held-out one are not trained on: the Euclidean distance of `Subject.vector`, which is
about 1.6 for two random subjects."""


@cache
def held_out() -> dict[str, Subject]:
    """Return the subjects by name, as ``red_striped_mug``: two or more of every class, the tuning concepts last."""
    rng = np.random.default_rng(20230204841)
    nouns = list(CLASSES)
    subjects: dict[str, Subject] = {}
    while len(subjects) < LABORATORY + TUNING:
        subject = sample_subject(rng, nouns[len(subjects) % len(nouns)])
        pattern = "" if subject.pattern == "plain" else f"{subject.pattern}_"
        subjects.setdefault(f"{subject.colours[0]}_{pattern}{subject.noun}", subject)
    return subjects


def reference_scenes(name: str) -> list[Scene]:
    """Return the three to five scenes of the images that a concept ships with: in different places, as photos."""
    rng = np.random.default_rng([20230204841, list(held_out()).index(name)])
    places = rng.permutation(list(PLACES))[: int(rng.integers(3, 6))]
    return [sample_scene(rng, place=str(place), style="photo") for place in places]


@cache
def _vectors(noun: str) -> np.ndarray:
    return np.stack([subject.vector() for subject in held_out().values() if subject.noun == noun])


def is_near_held_out(subject: Subject) -> bool:
    """Return whether a subject is within `RADIUS` of a held-out one, or would be described in the same words."""
    same_words = any(
        other.noun == subject.noun and other.colours[:2] == subject.colours[:2] and other.pattern == subject.pattern
        for other in held_out().values()
    )
    return same_words or bool((np.linalg.norm(_vectors(subject.noun) - subject.vector(), axis=1) < RADIUS).any())


def sample_trained_subject(rng: np.random.Generator) -> Subject:
    """Return a random subject that pretraining may see."""
    while True:
        subject = sample_subject(rng)
        if not is_near_held_out(subject):
            return subject
