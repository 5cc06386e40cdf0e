"""Images of a concept other than its own: renderings that no run sees, and more or fewer images to train on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from dvar.errors import RefusedInput
from dvar.files import staged_folder

UNSEEN_IMAGES = 4
MAX_IMAGES = 16
"""Instance images that a bundled concept can have, its own and further renderings."""
_UNSEEN_SEED, _FURTHER_SEED = 11, 13


def render_unseen_images(concept: str) -> list[Image.Image]:
    """Return renderings of a bundled concept that no run trains on, in places that none of its own images shows."""
    rng = np.random.default_rng([_UNSEEN_SEED, _number(concept)])
    return _render(concept, rng, list(rng.permutation(_places(concept))[:UNSEEN_IMAGES]))


def render_further_images(concept: str, count: int) -> list[Image.Image]:
    """Return renderings of a bundled concept to train on beside its own images.

    They show places that neither its own images nor the unseen ones show; where there are too few, places come twice.
    """
    unseen = np.random.default_rng([_UNSEEN_SEED, _number(concept)]).permutation(_places(concept))[:UNSEEN_IMAGES]
    rng = np.random.default_rng([_FURTHER_SEED, _number(concept)])
    places = rng.permutation([place for place in _places(concept) if place not in unseen])
    return _render(concept, rng, [str(places[index % len(places)]) for index in range(count)])


def list_image_files(folder: Path) -> list[Path]:
    """Return the files in the folder of a concept, by name."""
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def write_training_images(own: Path, target: Path, count: int, *, bundled: bool) -> None:
    """Write ``count`` images of a concept into a folder, unless it is there: its own by name, then further renderings.

    Args:
        own: The folder of the concept's own images, named after it.
        target: The folder to write.
        count: Number of images.
        bundled: Whether the concept is a bundled one, which can be rendered again.

    Raises:
        RefusedInput: There are not so many images, or some have captions of their own.
    """
    files = list_image_files(own)
    most = max(MAX_IMAGES, len(files)) if bundled else len(files)
    if not 1 <= count <= most:
        raise RefusedInput([f"images of {own.name} must be from 1 to {most}, got {count}: name fewer, or add images"])
    if captions := [path.name for path in files if path.suffix.lower() in (".txt", ".jsonl")]:
        rule = f"a number of images is chosen where none has a caption of its own, got {captions[0]} in {own}"
        raise RefusedInput([f"{rule}: record all of its images"])
    if target.exists():
        return
    with staged_folder(target) as staged:
        for path in files[:count]:
            shutil.copyfile(path, staged / path.name)
        for index, image in enumerate(render_further_images(own.name, count - len(files)) if bundled else ()):
            image.save(staged / f"further-{index:02d}.png")


def _number(concept: str) -> int:
    from dvar.mini.world.concepts import held_out

    return list(held_out()).index(concept)


def _places(concept: str) -> list[str]:
    """Return the places that none of a bundled concept's own images shows."""
    from dvar.mini.world.concepts import reference_scenes
    from dvar.mini.world.places import PLACES

    own = {scene.place for scene in reference_scenes(concept)}
    return [place for place in PLACES if place not in own]


def _render(concept: str, rng: np.random.Generator, places: list[str]) -> list[Image.Image]:
    from dvar.mini.world.concepts import held_out
    from dvar.mini.world.scene import render, sample_scene

    scenes = [sample_scene(rng, place=str(place), style="photo") for place in places]
    return [Image.fromarray(render(held_out()[concept], scene)) for scene in scenes]
