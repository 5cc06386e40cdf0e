"""The concepts that are recorded: their folders and class nouns."""

from __future__ import annotations

import json
from pathlib import Path

from dvar import mini
from dvar.errors import RefusedInput
from dvar.mini import TUNING


def concept_folders(folder: str | None = None) -> dict[str, Path]:
    """Return name to folder of the concepts in ``folder``, of the bundled ones without.

    Raises: RefusedInput when there is none.
    """
    if folder is None:
        return mini.concepts()
    found = {path.parent.name: path.parent for path in sorted(Path(folder).expanduser().glob("*/concept.json"))}
    if not found:
        said = f"{folder} holds no concepts: each is a folder of pictures"
        raise RefusedInput([f'{said} with a concept.json that says its class, {{"noun": "mug"}}'])
    return found


def noun_of(folder: Path) -> str:
    """Return the class noun of the concept in a folder.

    Raises: RefusedInput when its concept.json holds none.
    """
    try:
        return str(json.loads((folder / "concept.json").read_text(encoding="utf-8"))["noun"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput([f'{folder}/concept.json must hold {{"noun": "mug"}}, its class ({error})']) from error


def laboratory_concepts(folder: str | None = None) -> list[str]:
    """Return the concepts that tables are made on: all but the tuning ones."""
    return [name for name in concept_folders(folder) if name not in TUNING]
