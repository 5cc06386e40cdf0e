"""Checks of a config against a pack: which runs can share a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dvar.config.training import TrainingConfig

LOADED_BY = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "single_file_config",
    "mixed_precision",
    "gradient_checkpointing",
    "attention_slicing",
    "compile",
)
"""The settings that a base model is loaded by."""


def pack_key(config: TrainingConfig) -> tuple[Any, ...]:
    """Return the settings that the runs of a pack have in common: those of the base model, and its arithmetic."""
    return (*(getattr(config, name) for name in LOADED_BY), config.allow_tf32)


def problems(config: TrainingConfig) -> list[str]:
    """Return why the run of ``config`` cannot share a forward pass with others."""
    return list(_problems(config))


def _problems(config: TrainingConfig) -> Iterator[str]:
    rule = "runs of a pack share one frozen denoising network, which LoRA alone may change"
    remedy = "train it without --pack"
    if config.method == "custom-diffusion":
        yield f"{rule}, and custom-diffusion trains its weights: {remedy}"
    if getattr(config, "use_dora", False):
        yield f"{rule}, and use_dora scales its weights: {remedy}"
    rule = "runs of a pack are given copies of one base model, which cannot be copied"
    values = {"compile": config.compile, "quantize": config.quantize != "no", "offload": config.offload}
    for name in (name for name, value in values.items() if value):
        yield f"{rule} with {name} {getattr(config, name)}: drop it, or {remedy}"
