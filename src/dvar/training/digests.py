"""Digests of what a run learns from, which say whether it is the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from dvar.training.dataset import ClassImages, Concept


def digest_of(concept: Concept) -> str:
    """Return the SHA-256 of the images and captions of a concept, and of how often each is drawn."""
    digest = sha256()
    for index, image in enumerate(concept.images):
        digest.update(image.tobytes() + json.dumps(concept.texts(index)).encode())
    if concept.repeats:
        digest.update(json.dumps(concept.repeats).encode())
    _update_by_classes(digest, concept.classes)
    return digest.hexdigest()


def digest_of_classes(classes: Sequence[ClassImages]) -> str:
    """Return the SHA-256 of class images and their prompts."""
    digest = sha256()
    _update_by_classes(digest, classes)
    return digest.hexdigest()


def _update_by_classes(digest: Any, classes: Sequence[ClassImages]) -> None:
    for class_images in classes:
        for image in class_images.images:
            digest.update(image.tobytes())
        digest.update(class_images.prompt.encode())
