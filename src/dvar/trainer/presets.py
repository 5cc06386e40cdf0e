"""Named settings, as one table: the value of each, where it comes from, and the number it is expected to lead to.

The paper's values are the defaults of the settings classes; the table says where each was published.
``configure`` puts a preset under what was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dvar.config import BUNDLED_MODEL, TextualInversionConfig, canonical, nearest
from dvar.errors import RefusedInput

_DEFAULTS = {item.name: item.default for item in fields(TextualInversionConfig)}


@dataclass(frozen=True)
class Row:
    """One setting of one preset of one method; ``expected`` is a figure to check a run against, where one is known."""

    name: str
    method: str
    setting: str
    value: Any
    source: str
    expected: str = ""


def _paper(setting: str, source: str, expected: str = "") -> Row:
    return Row("paper", "textual-inversion", setting, _DEFAULTS[setting], source, expected)


def _mini(setting: str, value: Any, source: str, expected: str = "") -> Row:
    return Row("mini", "textual-inversion", setting, value, source, expected)


TABLE = (
    _paper("window", "Section 3.3", "stops at 566.0 ± 141.5 steps, mean over 48 concepts (Table 1)"),
    _paper("threshold", "Section 3.3", "Train CLIP img 0.795 ± 0.067, Val CLIP txt 0.227 ± 0.024 (Table 1)"),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4"),
    _paper("probe_every", "Section 3.2: after each step"),
    _paper("max_train_steps", "Section 4.2", "27.0 ± 0.3 minutes on an A100 without early stopping (Table 1)"),
    _paper("validation_steps", "Section 4.2"),
    _paper("num_validation_images", "Section 4.2"),
    _paper("train_batch_size", "Appendix C: 128 is 64 times the default"),
    _paper("learning_rate", "released command: 5e-3, scaled by the batch of 2"),
    _paper("lr_scheduler", "released code"),
    _paper("adam_beta1", "released code"),
    _paper("adam_beta2", "released code"),
    _paper("adam_epsilon", "released code"),
    _paper("adam_weight_decay", "released code", "shrinks the new vector by 0.945 in 566 steps, by itself"),
    _paper("resolution", "released code, for Stable Diffusion"),
    _paper("center_crop", "released command"),
    _paper("random_flip", "released code, with a probability of a half"),
    _paper("num_inference_steps", "released command"),
    _paper("guidance_scale", "released command"),
    _mini("resolution", 64, "the bundled model's own"),
    _mini("learning_rate", 1e-2, "the paper's; no worse than 3e-3 on the tuning concepts (LOG.md)"),
    _mini("train_batch_size", 4, "twice the paper's: pictures are small"),
    _mini("max_train_steps", 1500, "four minutes on two cores; ten at most"),
    _mini("window", 200, "the cap is a quarter of the paper's", "a straight line stops at step 517"),
    _mini("threshold", 0.15, "the paper's"),
    _mini("validation_steps", 100, "fifteen sets of samples up to the cap"),
    _mini("num_validation_images", 4, "half the paper's, for time"),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size"),
    _mini("num_inference_steps", 25, "half the paper's, for time"),
    _mini("guidance_scale", 5.0, "what the settings were tuned under"),
)


def settings(name: str, method: str = "textual-inversion") -> dict[str, Any]:
    """Setting to value of one preset.

    Raises: `RefusedInput` naming the nearest preset when there is none of that name.
    """
    names = sorted({row.name for row in TABLE if row.method == method})
    if name not in names:
        raise RefusedInput([f"preset must be one of {', '.join(names)}, got {name!r}: try {nearest(str(name), names)}"])
    return {row.setting: row.value for row in TABLE if (row.name, row.method) == (name, method)}


def configure(given: Mapping[str, Any]) -> TextualInversionConfig:
    """All settings of a run: what was ``given`` (paths may be `Path`), over the preset, over the defaults.

    Without a ``preset`` among the given it is 'mini' for the bundled model and 'paper' for any other; the result keeps
    its name.  Ranges are not checked here (`TextualInversionConfig.problems`).

    Raises: `RefusedInput` for unknown settings and unknown presets.
    """
    named = canonical({key: str(value) if isinstance(value, Path) else value for key, value in given.items()})
    model = named.get("pretrained_model_name_or_path", BUNDLED_MODEL)
    name = named.get("preset") or ("mini" if model == BUNDLED_MODEL else "paper")
    return TextualInversionConfig(**{**settings(name), **named, "preset": name})
