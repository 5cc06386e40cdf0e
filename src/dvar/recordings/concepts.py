"""Folders and class nouns of the concepts that are recorded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dvar import mini
from dvar.errors import RefusedInput
from dvar.files import read_json
from dvar.mini import TUNING
from dvar.training.dataset import open_image

MIN_IMAGES = 2
"""Images that a concept needs to be scored: similarity to a single one rewards its background."""
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def concept_folders(folder: str | None = None) -> dict[str, Path]:
    """Return the folder of each concept in ``folder``, by name; by default of the bundled concepts.

    Raises:
        RefusedInput: There is no concept in ``folder``.
    """
    if folder is None:
        return mini.concepts()
    paths = (path.with_suffix("") for path in sorted(Path(folder).expanduser().glob("*.json")))
    folders = {path.name: path for path in paths if path.is_dir()}
    if not folders:
        rule = f"{folder} holds no concepts: each is a folder of images, NAME"
        raise RefusedInput([f'{rule}, with a file NAME.json beside it that names its class, {{"noun": "mug"}}'])
    return folders


def read_noun(folder: Path) -> str:
    """Return the class noun of the concept in a folder.

    Raises:
        RefusedInput: The file NAME.json beside the folder holds none.
    """
    path = folder.with_name(f"{folder.name}.json")
    try:
        return str(read_json(path, {"noun": str})["noun"])
    except (OSError, ValueError) as error:
        raise RefusedInput([f'{path} must hold {{"noun": "mug"}}, the class of the concept ({error})']) from error


def read_prompts(folder: Path) -> tuple[str, ...]:
    """Return the validation prompts of the concept in a folder, with {} for the concept; empty where it has none.

    Raises:
        RefusedInput: The prompts in the file NAME.json beside the folder cannot be used.
    """
    path = folder.with_name(f"{folder.name}.json")
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return ()
    prompts = content.get("prompts", ()) if isinstance(content, dict) else ()
    if not isinstance(prompts, list | tuple) or not all(isinstance(text, str) and "{}" in text for text in prompts):
        rule = f"prompts in {path} must be a list of texts with {{}} where the concept stands"
        raise RefusedInput([f'{rule}, such as "a photo of {{}} in the snow", got {prompts!r}'])
    return tuple(prompts)


@dataclass(frozen=True)
class ConceptCheck:
    """A folder of images as a concept to record.

    Args:
        name: Name of the folder.
        noun: Class noun; empty where it cannot be read.
        images: Number of images that can be read.
        prompts: Number of validation prompts of its own.
        problems: Why it cannot be recorded, one line each.
    """

    name: str
    noun: str
    images: int
    prompts: int
    problems: tuple[str, ...]


def check_concepts(folder: str | Path) -> list[ConceptCheck]:
    """Return what each folder inside ``folder`` is worth as a concept, by name; no model is loaded.

    Raises:
        RefusedInput: There is no folder in ``folder``.
    """
    folders = [path for path in sorted(Path(folder).expanduser().glob("*")) if path.is_dir()]
    if not folders:
        raise RefusedInput([f"{folder} must hold a folder for each concept, got none: name another folder"])
    return [_check_concept(path) for path in folders]


def _check_concept(folder: Path) -> ConceptCheck:
    noun, prompts, problems = "", 0, []
    try:
        noun = read_noun(folder)
        if len(noun.split()) != 1:
            problems.append(f"noun in {folder}.json must be one word, got {noun!r}: name the class by one")
        prompts = len(read_prompts(folder))
    except RefusedInput as error:
        problems += error.problems
    images = 0
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _IMAGES:
            try:
                open_image(path)
                images += 1
            except RefusedInput as error:
                problems += [f"{folder}: {problem}" for problem in error.problems]
    if images < MIN_IMAGES:
        problems.append(f"{folder} must hold at least {MIN_IMAGES} images, got {images}: add some")
    return ConceptCheck(folder.name, noun, images, prompts, tuple(problems))


def laboratory_concepts(folder: str | None = None) -> list[str]:
    """Return the names of the concepts that tables count: all but the tuning concepts."""
    return [name for name in concept_folders(folder) if name not in TUNING]
