"""Folders and class nouns of the concepts that are recorded."""

from __future__ import annotations

import json
from pathlib import Path

from dvar import mini
from dvar.errors import RefusedInput
from dvar.mini import TUNING


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
        return str(json.loads(path.read_text(encoding="utf-8"))["noun"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput([f'{path} must hold {{"noun": "mug"}}, the class of the concept ({error})']) from error


def laboratory_concepts(folder: str | None = None) -> list[str]:
    """Return the names of the concepts that tables count: all but the tuning concepts."""
    return [name for name in concept_folders(folder) if name not in TUNING]
