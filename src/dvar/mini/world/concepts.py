"""The 52 held-out subjects: 48 for the laboratory, 4 for tuning, two or more of every class, never seen in
pretraining."""

from __future__ import annotations

from functools import cache

import numpy as np

from dvar.mini.world.classes import CLASSES
from dvar.mini.world.places import PLACES
from dvar.mini.world.scene import Scene, Subject, sample_scene, sample_subject

TUNING = 4
LABORATORY = 48
RADIUS = 0.7
"""Subjects nearer than this to a held-out one (Euclidean, `Subject.vector`; two random ones are about 1.6 apart)
are not trained on."""


@cache
def held_out() -> dict[str, Subject]:
    """Name to subject; the tuning concepts come last.  A name says colour, pattern and class: ``red_striped_mug``."""
    rng = np.random.default_rng(20230204841)
    nouns = list(CLASSES)
    subjects: dict[str, Subject] = {}
    while len(subjects) < LABORATORY + TUNING:
        subject = sample_subject(rng, nouns[len(subjects) % len(nouns)])
        pattern = "" if subject.pattern == "plain" else f"{subject.pattern}_"
        subjects.setdefault(f"{subject.colours[0]}_{pattern}{subject.noun}", subject)
    return subjects


def reference_scenes(name: str) -> list[Scene]:
    """The three to five scenes of the pictures that a concept ships with: upright enough, in different places, in
    the plain style."""
    rng = np.random.default_rng([20230204841, list(held_out()).index(name)])
    places = rng.permutation(list(PLACES))[: int(rng.integers(3, 6))]
    return [sample_scene(rng, place=str(place), style="photo") for place in places]


@cache
def _vectors(noun: str) -> np.ndarray:
    return np.stack([subject.vector() for subject in held_out().values() if subject.noun == noun])


def is_near_held_out(subject: Subject) -> bool:
    """Whether a subject lies within `RADIUS` of a held-out one, or would be told by the same words."""
    same_words = any(
        other.noun == subject.noun and other.colours[:2] == subject.colours[:2] and other.pattern == subject.pattern
        for other in held_out().values()
    )
    return same_words or bool((np.linalg.norm(_vectors(subject.noun) - subject.vector(), axis=1) < RADIUS).any())


def sample_trained_subject(rng: np.random.Generator) -> Subject:
    """A subject that pretraining may see."""
    while True:
        subject = sample_subject(rng)
        if not is_near_held_out(subject):
            return subject
