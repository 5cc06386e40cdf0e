"""The bundled models, small latent diffusion models of one made-up world, and the concepts that they never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput

_HERE = Path(__file__).parent
_FOLDERS = {"mini": "model", "mini-flow": "flow"}
TUNING = (
    "pink_checked_house",
    "brown_boot",
    "purple_cat",
    "turquoise_dog",
    "orange_checked_duck",
    "green_dotted_fish",
    "red_bird",
    "turquoise_dotted_owl",
    "turquoise_teddy",
    "turquoise_checked_snail",
    "pink_vase",
    "pink_mug",
)
"""The twelve concepts that settings are chosen on; every table is made on the other 48."""


def path(name: str = "mini") -> Path:
    """Return the folder of a bundled model in the format of diffusers.

    Args:
        name: "mini", for ``StableDiffusionPipeline.from_pretrained``, or "mini-flow", for ``StableDiffusion3Pipeline``.

    Raises:
        RefusedInput: The weights, which are a distribution of their own, are not installed.
    """
    folder = _HERE / _FOLDERS[name]
    if not (folder / "model_index.json").exists():
        model = "the bundled model" if name == "mini" else f"the bundled model {name}"
        raise RefusedInput([f"{model} is not installed: pip install dvar-mini, or name another model"])
    return folder


def judges() -> Path:
    """Return the folder of what scores images and conditions nothing: a CLIP, and the recogniser.

    Raises:
        RefusedInput: As `path`.
    """
    path()
    return _HERE / "judges"


def concepts() -> dict[str, Path]:
    """Return the folders of all 60 held-out concepts by name, with the tuning concepts last.

    Each holds three to five images and nothing else; a file beside it, NAME.json, has its noun and its parameters.

    Raises:
        RefusedInput: As `path`.
    """
    path()
    folders = {path.stem: path.with_suffix("") for path in (_HERE / "concepts").glob("*.json")}
    return {name: folders[name] for name in sorted(folders, key=lambda name: (name in TUNING, name))}


def gates(name: str = "mini") -> dict[str, dict[str, Any]]:
    """Return the `dvar.analysis.eligibility.Eligibility` of each method, measured when a bundled model was frozen."""
    models: dict[str, dict[str, Any]] = json.loads((_HERE / "gate.json").read_text(encoding="utf-8"))
    return dict(models[name]["gates"]) if name in models else {}


def noun(name: str) -> str:
    """Return the class noun of a concept, as captions use it."""
    return str(json.loads(concepts()[name].with_suffix(".json").read_text(encoding="utf-8"))["noun"])


def places(name: str) -> list[str]:
    """Return the places in which the images of a concept show it, by their names in the world."""
    return list(json.loads(concepts()[name].with_suffix(".json").read_text(encoding="utf-8"))["places"])


def training_settings(method: str, name: str) -> dict[str, str | Path]:
    """Return the settings by which a method learns a concept: its images, a new word, and its class noun."""
    noun_setting = "class_noun" if method == "custom-diffusion" else "initializer_token"
    return {"instance_data_dir": concepts()[name], "placeholder_token": "<thing>", noun_setting: noun(name)}
