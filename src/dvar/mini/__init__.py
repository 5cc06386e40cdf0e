"""The bundled model: a small, complete latent diffusion model of a picture book, and the concepts it never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput

_HERE = Path(__file__).parent
TUNING = ("pink_checked_house", "brown_boot", "purple_cat", "turquoise_dog")
"""The four concepts on which settings are chosen; every table is made on the other 48."""


def path() -> Path:
    """The model's folder, in the format of diffusers; ``StableDiffusionPipeline.from_pretrained`` loads it.

    Raises: RefusedInput when the weights, a distribution of their own, are not installed.
    """
    folder = _HERE / "model"
    if not (folder / "model_index.json").exists():
        raise RefusedInput(["the bundled model is not installed: pip install dvar-mini, or name another model"])
    return folder


def judges() -> Path:
    """The folder of what scores pictures and conditions nothing: a CLIP, and the recogniser.

    Raises: RefusedInput as `path` does.
    """
    path()
    return _HERE / "judges"


def concepts() -> dict[str, Path]:
    """Name to folder of all 52 held-out concepts, each three to five pictures and a ``concept.json``; the tuning
    ones come last.

    Raises: RefusedInput as `path` does.
    """
    path()
    folders = {folder.parent.name: folder.parent for folder in sorted((_HERE / "concepts").glob("*/concept.json"))}
    return {name: folders[name] for name in sorted(folders, key=lambda name: (name in TUNING, name))}


def gates() -> dict[str, dict[str, Any]]:
    """Return, by method, the figures of `dvar.analysis.eligibility.Eligibility`, as of when the model was frozen."""
    gates: dict[str, dict[str, Any]] = json.loads((_HERE / "gate.json").read_text(encoding="utf-8"))["gates"]
    return gates


def noun(name: str) -> str:
    """The class noun of a concept, as captions use it."""
    return str(json.loads((concepts()[name] / "concept.json").read_text(encoding="utf-8"))["noun"])


def given(method: str, name: str) -> dict[str, str | Path]:
    """What a method must be told to learn a concept: its pictures, a new word, the noun as the method asks for it."""
    asked = "class_noun" if method == "custom-diffusion" else "initializer_token"
    return {"instance_data_dir": concepts()[name], "placeholder_token": "<thing>", asked: noun(name)}
