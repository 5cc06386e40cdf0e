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
    folders = {path.parent.name: path.parent for path in sorted(Path(folder).expanduser().glob("*/concept.json"))}
    if not folders:
        rule = f"{folder} holds no concepts: each is a folder of images"
        raise RefusedInput([f'{rule} with a concept.json that names its class, {{"noun": "mug"}}'])
    return folders


def read_noun(folder: Path) -> str:
    """Return the class noun of the concept in a folder.

    Raises:
        RefusedInput: The folder's concept.json holds none.
    """
    try:
        return str(json.loads((folder / "concept.json").read_text(encoding="utf-8"))["noun"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput([f'{folder}/concept.json must hold {{"noun": "mug"}}, its class ({error})']) from error


def laboratory_concepts(folder: str | None = None) -> list[str]:
    """Return the names of the concepts that tables count: all but the tuning concepts."""
    return [name for name in concept_folders(folder) if name not in TUNING]
