"""Settings that make a recording another one than its preset's: their names in folders and in headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from dvar.config.fields import canonical_settings
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL, TrainingConfig

LOCATIONS = (
    "instance_data_dir",
    "class_data_dir",
    "output_dir",
    "overwrite",
    "resume_from_checkpoint",
    "report_to",
)
MONITORING = ("window", "threshold", "validation_steps", "num_validation_images")
"""When a run is judged and sampled: any rule reads a recorded run, so these may change without making it another."""
MODEL, IMAGES = "model", "images"
"""Names of what is no setting of a method: the base model, and the number of instance images."""
_MAX_NAME = 120

Setting = Mapping[str, Mapping[str, Any]]
"""What differs from the preset, by name: its "value", and that of the "preset"."""


def list_changes(model: str, settings: Mapping[str, Any], config_type: type[TrainingConfig]) -> dict[str, Any]:
    """Return the settings among these that make another recording than the preset's, with what the preset has.

    Args:
        model: The base model.
        settings: Settings of a method, by name or alias.
        config_type: The config class of the method.

    Returns:
        A `Setting`; empty for the bundled model as its preset has it.

    Raises:
        RefusedInput: A setting is unknown.
    """
    own = canonical_settings(settings, config_type)
    preset = configure({"pretrained_model_name_or_path": model}, config_type)
    changes: dict[str, Any] = {}
    if model != BUNDLED_MODEL:
        changes[MODEL] = {"value": re.split(r"[/\\]", model.rstrip("/\\"))[-1], "preset": BUNDLED_MODEL}
    for name, value in own.items():
        if name not in LOCATIONS + MONITORING and value != getattr(preset, name):
            changes[name] = {"value": value, "preset": getattr(preset, name)}
    return changes


def format_variant(setting: Setting) -> str:
    """Return what the folder of a recording has after its seed: "" for the preset, or ",learning_rate=0.02".

    Different settings have different names: what a file name cannot hold is replaced, and then a digest is added.
    """
    values = {name: str(change["value"]) for name, change in setting.items()}
    safe = {name: re.sub(r"[^\w.+-]", "-", value) for name, value in values.items()}
    variant = "".join(f",{name}={value}" for name, value in safe.items())
    if safe == values and len(variant) <= _MAX_NAME:
        return variant
    return f"{variant[:_MAX_NAME]},{sha256(repr(values).encode()).hexdigest()[:8]}"


def split_folder_name(name: str) -> tuple[int, str]:
    """Return the seed and the variant in the name of a recording's folder.

    Raises:
        ValueError: The name does not begin with a seed.
    """
    seed, comma, variant = name.partition(",")
    return int(seed), comma + variant
