"""Presets: named settings as one table, with the source of each value and the result it is expected to lead to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from dvar.config.fields import canonical_settings
from dvar.config.methods import PAPER_METHODS
from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS, FLOW_MODEL, TrainingConfig
from dvar.errors import RefusedInput, nearest
from dvar.stopping.verdict import MIN_RECORDS

C = TypeVar("C", bound=TrainingConfig)
ModelSettings = Callable[[TrainingConfig], Mapping[str, Any]]

# The paper's values are the defaults of the config classes; the table says where each was published.
_DEFAULTS = {
    method: {item.name: item.default for item in fields(config_type)} for method, config_type in PAPER_METHODS.items()
}
TI, LORA, CUSTOM = _DEFAULTS


@dataclass(frozen=True)
class PresetRow:
    """One setting of one preset of one method.

    Attributes:
        source: Where the value comes from.
        expected: A figure to check a run against, where one is known.
    """

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


STRATIFIED = ("stratified", "of eight independent draws two early ones can be nine tenths of L_det")
_PAPER_AND_MINI = (
    _paper("window", "Section 3.3", "stops at 566.0 ± 141.5 steps, mean over 48 concepts (Table 1)"),
    _paper("threshold", "Section 3.3", "Train CLIP img 0.795 ± 0.067, Val CLIP txt 0.227 ± 0.024 (Table 1)"),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4"),
    _paper("eval_timesteps", "Section 2.2"),
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
    _mini("train_batch_size", 4, "twice the paper's: images are small"),
    _mini("max_train_steps", 1500, "four minutes on two cores; ten at most"),
    _mini("window", 200, "the cap is a quarter of the paper's", "a straight line stops at step 517"),
    _mini("threshold", 0.15, "the paper's"),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)"),
    _mini("eval_timesteps", STRATIFIED[0], STRATIFIED[1]),
    _mini("validation_steps", 100, "fifteen sets of samples up to the cap"),
    _mini("num_validation_images", 4, "half the paper's, for time"),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size"),
    _mini("num_inference_steps", 25, "half the paper's, for time"),
    _mini("guidance_scale", 5.0, "what the settings were tuned under"),
    _paper("window", "Section 3.3", "stops at 665.3 ± 94.9 steps, mean over 48 concepts (Table 1)", method=LORA),
    _paper("threshold", "Section 3.3", "a straight line stops at step 695", method=LORA),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4", method=LORA),
    _paper("eval_timesteps", "Section 2.2", method=LORA),
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
    _mini("train_batch_size", 4, "twice the paper's: images are small", method=LORA),
    _mini("max_train_steps", 600, "minutes on two cores; not tuned yet", method=LORA),
    _mini("window", 240, "the paper's share of the cap, nearly; not tuned yet", "a straight line: 379", method=LORA),
    _mini("threshold", 0.4, "the paper's", method=LORA),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)", method=LORA),
    _mini("eval_timesteps", STRATIFIED[0], STRATIFIED[1], method=LORA),
    _mini("validation_steps", 100, "the paper's", method=LORA),
    _mini("num_validation_images", 4, "half the paper's, for time", method=LORA),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size", method=LORA),
    _mini("num_inference_steps", 25, "half the paper's, for time", method=LORA),
    _mini("guidance_scale", 5.0, "as for Textual Inversion", method=LORA),
    _paper("window", "Section 3.3", "stops at 348.1 ± 46.6 steps, mean over 48 concepts (Table 1)", method=CUSTOM),
    _paper("threshold", "Section 3.3", "a straight line stops at step 464", method=CUSTOM),
    _paper("eval_batch_size", "Section 3.2; the released code's default is 4", method=CUSTOM),
    _paper("eval_timesteps", "Section 2.2", method=CUSTOM),
    _paper("probe_every", "Section 3.2: after each step", method=CUSTOM),
    _paper("max_train_steps", "Section 4.2", "6.5 minutes on an A100 without early stopping", method=CUSTOM),
    _paper("validation_steps", "Section 4.2", method=CUSTOM),
    _paper("num_validation_images", "Section 4.2", method=CUSTOM),
    _paper("train_batch_size", "released command; as many class images beside them", method=CUSTOM),
    _paper("learning_rate", "released command: 1e-5, scaled by the batch of 2 and by 2 for the prior", method=CUSTOM),
    _paper("adam_weight_decay", "released code", method=CUSTOM),
    _paper("max_grad_norm", "released code", method=CUSTOM),
    _paper("prior_loss_weight", "released code", method=CUSTOM),
    _paper("num_class_images", "released code, where they are retrieved photographs", method=CUSTOM),
    _paper("initializer_token", "released command", method=CUSTOM),
    _paper("freeze_model", "released code", method=CUSTOM),
    _paper("random_rescale", "released code", method=CUSTOM),
    _paper("resolution", "released code, for Stable Diffusion", method=CUSTOM),
    _paper("center_crop", "released code: the whole image is squeezed", method=CUSTOM),
    _paper("random_flip", "released code, with a probability of a half", method=CUSTOM),
    _paper("num_inference_steps", "released command", method=CUSTOM),
    _paper("guidance_scale", "released command", method=CUSTOM),
    _mini("resolution", 64, "the bundled model's own", method=CUSTOM),
    _mini("learning_rate", 3e-4, "the paper's 4e-5 moves little; 1e-3 forgets places (LOG.md)", method=CUSTOM),
    _mini("train_batch_size", 4, "twice the paper's: images are small", method=CUSTOM),
    _mini("max_train_steps", 500, "the paper's; not tuned yet", method=CUSTOM),
    _mini("window", 180, "the paper's", "a straight line stops at step 464", method=CUSTOM),
    _mini("threshold", 0.15, "the paper's", method=CUSTOM),
    _mini("random_rescale", False, "the picture book's captions know no zoom", method=CUSTOM),
    _mini("num_class_images", 64, "a third of the paper's, for time", method=CUSTOM),
    _mini("probe_every", 10, "under a tenth of the time on two cores (docs/performance.md)", method=CUSTOM),
    _mini("eval_timesteps", STRATIFIED[0], STRATIFIED[1], method=CUSTOM),
    _mini("validation_steps", 100, "the paper's", method=CUSTOM),
    _mini("num_validation_images", 4, "half the paper's, for time", method=CUSTOM),
    _mini("checkpointing_steps", 100, "a checkpoint costs milliseconds at this size", method=CUSTOM),
    _mini("num_inference_steps", 25, "half the paper's, for time", method=CUSTOM),
    _mini("guidance_scale", 5.0, "as for Textual Inversion", method=CUSTOM),
)

LEAN = {TI: 30, LORA: 40, CUSTOM: 20}
"""Steps between two evaluations of the preset "lean", for models other than the bundled one.

By counts of forward passes, evaluations then take about a twentieth of the time, and a window holds nine or more.
"""
LEAN_SAMPLES: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "validation_steps": ({TI: 1500, LORA: 250, CUSTOM: 125}, "a quarter of the cap, about"),
        "num_validation_images": (
            4,
            "by the paper's eight at every hundredth step a LoRA takes longer to show than to train",
        ),
    }
)


def _lean(row: PresetRow) -> PresetRow:
    lean = replace(row, name="lean")
    if row.setting == "probe_every":
        return replace(lean, value=LEAN[row.method], source="about a twentieth of the time, by forward passes")
    if row.setting == "eval_timesteps":
        return replace(lean, value=STRATIFIED[0], source=STRATIFIED[1])
    if row.setting in LEAN_SAMPLES:
        value, source = LEAN_SAMPLES[row.setting]
        return replace(lean, value=value if isinstance(value, int) else value[row.method], source=source)
    return lean


_FLOW = {
    "learning_rate": ("as for mini; not tuned yet", ""),
}
"""What is said of the settings of mini-flow in place of what is said of those of mini, by setting."""


def _flow(row: PresetRow) -> PresetRow:
    source, expected = _FLOW.get(row.setting, (row.source, row.expected))
    return replace(row, name=FLOW_MODEL, source=source, expected=expected)


_V1 = {
    "window": (282, "command of the first version"),
    "threshold": (0.39, "command of the first version"),
    "eval_batch_size": (4, "command of the first version"),
    "train_batch_size": (4, "command of the first version for Stable Diffusion; 8 for Latent Diffusion"),
    "learning_rate": (2e-2, "command of the first version: 5e-3, scaled by the batch of 4"),
    "num_inference_steps": (200, "default of the first version's code"),
}
"""What the paper's first version, on Textual Inversion alone, set otherwise than the last one, and its source."""


def _v1(row: PresetRow) -> PresetRow:
    value, source = _V1.get(row.setting, (row.value, row.source))
    return replace(row, name="v1", value=value, source=source, expected="")


SMOKE = "smoke"
"""The preset that changes no more of the model's own than how long a run takes: whether it runs at all."""
_SMOKE: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "max_train_steps": (20, "seconds on the bundled model"),
        "window": (10, "half of the cap"),
        "probe_every": (1, "a window holds ten evaluations"),
        "eval_batch_size": (2, "a quarter of the paper's, for time"),
        "validation_steps": (10, "samples on the way and at the end"),
        "num_validation_images": (1, "one is seen to be an image as well as four"),
        "num_inference_steps": (5, "for time"),
        "checkpointing_steps": (10, "a checkpoint on the way and one at the end"),
        "num_class_images": (2, "for time"),
    }
)


def _smoke(method: str) -> Iterator[PresetRow]:
    for setting, (value, source) in _SMOKE.items():
        if setting in _DEFAULTS[method]:
            yield PresetRow(SMOKE, method, setting, value, source)


TABLE = (
    *_PAPER_AND_MINI,
    *(row for method in PAPER_METHODS for row in _smoke(method)),
    *(_lean(row) for row in _PAPER_AND_MINI if row.name == "paper"),
    *(_flow(row) for row in _PAPER_AND_MINI if row.name == "mini" and row.method != CUSTOM),
    *(_v1(row) for row in _PAPER_AND_MINI if (row.name, row.method) == ("paper", TI)),
)


def preset_settings(name: str, method: str = TI) -> dict[str, Any]:
    """Return the settings of one preset, by name.

    Raises:
        RefusedInput: There is no such preset.
    """
    names = sorted({row.name for row in TABLE if row.method == method})
    if not names:
        raise RefusedInput([f"method {method} has no presets, got preset {name!r}: drop it"])
    if name not in names:
        remedy = f"try {near}" if (near := nearest(str(name), names)) else "choose one of them"
        raise RefusedInput([f"preset must be one of {', '.join(names)}, got {name!r}: {remedy}"])
    return {row.setting: row.value for row in TABLE if (row.name, row.method) == (name, method)}


def configure(values: Mapping[str, Any], config_type: type[C], model_settings: ModelSettings | None = None) -> C:
    """Return the config of a run: ``values`` over the preset over the defaults.

    Without a ``preset`` in ``values`` it is that of the bundled model, "mini" or "mini-flow", and "lean" for any other
    model; methods of other packages have none. "smoke" stands over that preset of the model, what a model of another
    family needs over "lean", and what the rule octave needs over any. The config keeps the name.
    Ranges are not checked here: `dvar.config.training.problems`.

    Args:
        values: Settings by field name or alias; paths may be `Path`.
        config_type: The config class of the method.
        model_settings: Returns what the base model of a config needs in place of "lean", whose values are for Stable
            Diffusion 1.5.

    Raises:
        RefusedInput: Settings are unknown, or the preset is.
    """
    named, preset = _split_settings(values, config_type, model_settings)
    return config_type(**{**preset, **named})


OCTAVE: Mapping[str, tuple[Any, str]] = MappingProxyType(
    {
        "probes_per_octave": (6, "its cheap form in the panel (docs/protocol.md)"),
        "eval_batch_size": (16, "as above"),
        "eval_timesteps": STRATIFIED,
    }
)
"""What the rule octave has in place of the settings of a preset: value and source."""

STEP_SETTINGS = ("window", "probe_every", "validation_steps", "checkpointing_steps")
"""The settings that count steps of a run and are scaled to a low cap, the window first."""


def configure_to_cap(
    values: Mapping[str, Any], config_type: type[C], model_settings: ModelSettings | None = None
) -> tuple[C, str]:
    """Return the config of `configure` with the preset's steps scaled to a low cap, and a sentence that says so.

    A loss that falls in a straight line is stopped after window / sqrt(threshold) steps, and one that slows down no
    later. Under a lower cap the preset's window, its cadence, and its steps between two sets of samples and between two
    checkpoints shrink in proportion, but for those in ``values``. The sentence is empty where nothing is scaled.

    Args:
        values: As for `configure`.
        config_type: The config class of the method.
        model_settings: As for `configure`.

    Raises:
        RefusedInput: As `configure`.
    """
    named, preset = _split_settings(values, config_type, model_settings)
    config, cap = config_type(**{**preset, **named}), named.get("max_train_steps")
    if not isinstance(cap, int) or not preset.keys() >= {"window", "threshold"}:
        return config, ""
    suited = math.ceil(preset["window"] / math.sqrt(preset["threshold"]))
    if not MIN_RECORDS < cap < suited:
        return config, ""
    of_another_rule = ("window", "probe_every") if config.rule == "octave" else ()
    scaled = {
        name: value
        for name in STEP_SETTINGS
        if name not in named and name not in of_another_rule
        if (value := max(MIN_RECORDS if name == "window" else 1, getattr(config, name) * cap // suited))
        != getattr(config, name)
    }
    if not scaled:
        return config, ""
    changes = ", ".join(f"{name} {value} instead of {getattr(config, name)}" for name, value in scaled.items())
    sentence = f"preset {named['preset']} is meant for caps from {suited} steps on, and is scaled to {cap}: {changes}"
    return replace(config, **scaled), sentence


def _split_settings(
    values: Mapping[str, Any], config_type: type[C], model_settings: ModelSettings | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings in ``values`` with the name of the preset, and those of the preset beneath them."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    named = canonical_settings(plain, config_type)
    name, method = named.get("preset"), config_type.method
    if method not in _DEFAULTS:
        return {**named, "preset": name}, preset_settings(name, method) if name else {}
    model = named.get("pretrained_model_name_or_path", BUNDLED_MODEL)
    has_own = model in BUNDLED_MODELS and any((row.name, row.method) == (model, method) for row in TABLE)
    own = model if has_own else "lean"
    base = own if name in (None, SMOKE) else name
    settings = preset_settings(base, method)
    if base == "lean" and model_settings:
        settings |= model_settings(config_type(**{**settings, **named}))
    if name == SMOKE:
        settings |= preset_settings(name, method)
    if named.get("rule") == "octave":
        settings |= {setting: value for setting, (value, _) in OCTAVE.items()}
        if "probe_every" in named:
            del settings["probes_per_octave"]
    return {**named, "preset": name or own}, settings
