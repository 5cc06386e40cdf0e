"""Named settings, as one table: the value of each, where it comes from, and the number it is expected to lead to.

The paper's values are the defaults of the settings classes; the table says where each was published.  Other models than
the bundled one start from "lean", the paper's settings with a probe that costs little.
``configure`` puts a preset under what was given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dvar.config.fields import canonical
from dvar.config.training import BUNDLED_MODEL, CONFIGS, AnyConfig
from dvar.errors import RefusedInput, nearest

_DEFAULTS = {method: {item.name: item.default for item in fields(known)} for method, known in CONFIGS.items()}
TI, LORA, CUSTOM = CONFIGS


@dataclass(frozen=True)
class PresetRow:
    """One setting of one preset of one method; ``expected`` is a figure to check a run against, where one is known."""

    name: str
    method: str
    setting: str
    value: Any
    source: str
    expected: str = ""


def _paper(setting: str, source: str, expected: str = "", *, method: str = TI) -> PresetRow:
    return PresetRow("paper", method, setting, _DEFAULTS[method][setting], source, expected)


def _mini(setting: str, value: Any, source: str, expected: str = "", *, method: str = TI) -> PresetRow:
    return PresetRow("mini", method, setting, value, source, expected)


_PAPER_AND_MINI = (
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
    _mini("learning_rate", 5e-3, "half the paper's; of 3e-3, 5e-3 and 1e-2 the best at the cap (LOG.md)"),
    _mini("train_batch_size", 4, "twice the paper's: pictures are small"),
    _mini("max_train_steps", 1500, "four minutes on two cores; ten at most"),
    _mini("window", 200, "the cap is a quarter of the paper's", "a straight line stops at step 517"),
    _mini("threshold", 0.15, "the paper's"),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)"),
    _mini("validation_steps", 100, "fifteen sets of samples up to the cap"),
    _mini("num_validation_images", 4, "half the paper's, for time"),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size"),
    _mini("num_inference_steps", 25, "half the paper's, for time"),
    _mini("guidance_scale", 5.0, "what the settings were tuned under"),
    _paper("window", "Section 3.3", "stops at 665.3 ± 94.9 steps, mean over 48 concepts (Table 1)", method=LORA),
    _paper("threshold", "Section 3.3", "a straight line stops at step 695", method=LORA),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4", method=LORA),
    _paper("probe_every", "Section 3.2: after each step", method=LORA),
    _paper("max_train_steps", "Section 4.2", "7.8 minutes on an A100 without early stopping", method=LORA),
    _paper("validation_steps", "Section 4.2", method=LORA),
    _paper("num_validation_images", "Section 4.2", method=LORA),
    _paper("train_batch_size", "released command", method=LORA),
    _paper("learning_rate", "released command: 5e-4, scaled by the batch of 2", method=LORA),
    _paper("adam_weight_decay", "released code", method=LORA),
    _paper("rank", "released code", "the released code adapts the feed-forward gates too", method=LORA),
    _paper("lora_alpha", "released code: a scale of 1", method=LORA),
    _paper("resolution", "released code, for Stable Diffusion", method=LORA),
    _paper("center_crop", "released command", method=LORA),
    _paper("random_flip", "released code, with a probability of a half", method=LORA),
    _paper("num_inference_steps", "released command", method=LORA),
    _paper("guidance_scale", "released command", method=LORA),
    _mini("resolution", 64, "the bundled model's own", method=LORA),
    _mini("learning_rate", 1e-3, "the paper's; 5e-4 and 2e-3 were no better at the cap (LOG.md)", method=LORA),
    _mini("train_batch_size", 4, "twice the paper's: pictures are small", method=LORA),
    _mini("max_train_steps", 600, "minutes on two cores; not tuned yet", method=LORA),
    _mini("window", 240, "the paper's share of the cap, nearly; not tuned yet", "a straight line: 379", method=LORA),
    _mini("threshold", 0.4, "the paper's", method=LORA),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)", method=LORA),
    _mini("validation_steps", 100, "the paper's", method=LORA),
    _mini("num_validation_images", 4, "half the paper's, for time", method=LORA),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size", method=LORA),
    _mini("num_inference_steps", 25, "half the paper's, for time", method=LORA),
    _mini("guidance_scale", 5.0, "as for Textual Inversion", method=LORA),
    _paper("window", "Section 3.3", "stops at 348.1 ± 46.6 steps, mean over 48 concepts (Table 1)", method=CUSTOM),
    _paper("threshold", "Section 3.3", "a straight line stops at step 464", method=CUSTOM),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4", method=CUSTOM),
    _paper("probe_every", "Section 3.2: after each step", method=CUSTOM),
    _paper("max_train_steps", "Section 4.2", "6.5 minutes on an A100 without early stopping", method=CUSTOM),
    _paper("validation_steps", "Section 4.2", method=CUSTOM),
    _paper("num_validation_images", "Section 4.2", method=CUSTOM),
    _paper("train_batch_size", "released command; as many class pictures beside them", method=CUSTOM),
    _paper("learning_rate", "released command: 1e-5, scaled by the batch of 2 and by 2 for the prior", method=CUSTOM),
    _paper("adam_weight_decay", "released code", method=CUSTOM),
    _paper("max_grad_norm", "released code", method=CUSTOM),
    _paper("prior_loss_weight", "released code", method=CUSTOM),
    _paper("num_class_images", "released code, where they are retrieved photographs", method=CUSTOM),
    _paper("initializer_token", "released command", method=CUSTOM),
    _paper("freeze_model", "released code", method=CUSTOM),
    _paper("random_rescale", "released code", method=CUSTOM),
    _paper("resolution", "released code, for Stable Diffusion", method=CUSTOM),
    _paper("center_crop", "released code: the whole picture is squeezed", method=CUSTOM),
    _paper("random_flip", "released code, with a probability of a half", method=CUSTOM),
    _paper("num_inference_steps", "released command", method=CUSTOM),
    _paper("guidance_scale", "released command", method=CUSTOM),
    _mini("resolution", 64, "the bundled model's own", method=CUSTOM),
    _mini("learning_rate", 3e-4, "the paper's 4e-5 moves little; 1e-3 forgets places (LOG.md)", method=CUSTOM),
    _mini("train_batch_size", 4, "twice the paper's: pictures are small", method=CUSTOM),
    _mini("max_train_steps", 500, "the paper's; not tuned yet", method=CUSTOM),
    _mini("window", 180, "the paper's", "a straight line stops at step 464", method=CUSTOM),
    _mini("threshold", 0.15, "the paper's", method=CUSTOM),
    _mini("random_rescale", False, "the picture book's captions know no zoom", method=CUSTOM),
    _mini("num_class_images", 64, "a third of the paper's, for time", method=CUSTOM),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)", method=CUSTOM),
    _mini("validation_steps", 100, "the paper's", method=CUSTOM),
    _mini("num_validation_images", 4, "half the paper's, for time", method=CUSTOM),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size", method=CUSTOM),
    _mini("num_inference_steps", 25, "half the paper's, for time", method=CUSTOM),
    _mini("guidance_scale", 5.0, "as for Textual Inversion", method=CUSTOM),
)

LEAN = {TI: 30, LORA: 40, CUSTOM: 20}
"""Steps between two evaluations, such that by counts of forward passes they take about a twentieth of the time, and a
window holds nine or more."""
TABLE = (
    *_PAPER_AND_MINI,
    *(
        replace(row, name="lean", value=LEAN[row.method], source="about a twentieth of the time, by forward passes")
        if row.setting == "probe_every"
        else replace(row, name="lean")
        for row in _PAPER_AND_MINI
        if row.name == "paper"
    ),
)


def settings(name: str, method: str = TI) -> dict[str, Any]:
    """Setting to value of one preset.

    Raises: `RefusedInput` naming the nearest preset when there is none of that name.
    """
    names = sorted({row.name for row in TABLE if row.method == method})
    if name not in names:
        raise RefusedInput([f"preset must be one of {', '.join(names)}, got {name!r}: try {nearest(str(name), names)}"])
    return {row.setting: row.value for row in TABLE if (row.name, row.method) == (name, method)}


def configure(given: Mapping[str, Any], method: str = TI) -> AnyConfig:
    """All settings of a run of ``method``: what was ``given`` (paths may be `Path`), over preset, over defaults.

    Without a ``preset`` among the given it is 'mini' for the bundled model and 'lean' for any other, which is 'paper'
    with a probe every so many steps; the result keeps its name.  Ranges are not checked here
    (`dvar.config.training.settings_problems`).

    Raises: `RefusedInput` for unknown settings and unknown presets.
    """
    known = CONFIGS[method]
    named = canonical({key: str(value) if isinstance(value, Path) else value for key, value in given.items()}, known)
    model = named.get("pretrained_model_name_or_path", BUNDLED_MODEL)
    name = named.get("preset") or ("mini" if model == BUNDLED_MODEL else "lean")
    return known(**{**settings(name, method), **named, "preset": name})
