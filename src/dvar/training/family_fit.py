"""A config and the family of its base model: what the family takes by default, and what it cannot learn or do."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

from dvar.config.buckets import valid_buckets
from dvar.config.fields import SAMPLING_STEPS
from dvar.config.training import TrainingConfig
from dvar.diffusion.families import BackboneEntry, find_family
from dvar.diffusion.source import ModelSource
from dvar.diffusion.tokens import read_index
from dvar.errors import ModelError
from dvar.files import read_json

DISTILLED = ("schnell", "turbo")
"""Words in the names of models that generate in a few steps, without guidance."""


def family_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return what the base model of ``config``, where it is at hand, takes in place of the paper's settings."""
    source = ModelSource.of(config)
    try:
        index = read_index(source)
        family = find_family(source.name, index["_class_name"])
    except ModelError:
        return {}
    words = Path(source.name).name.lower()
    distilled = index.get("is_distilled") is True or any(word in words for word in DISTILLED)
    return family.settings_of(config.method, distilled=distilled)


def family_at_hand(config: TrainingConfig) -> BackboneEntry | None:
    """Return the family of the base model of ``config``; None where it is not at hand, or is of none."""
    source = ModelSource.of(config)
    try:
        return find_family(source.name, read_index(source)["_class_name"])
    except ModelError:
        return None


def problems(config: TrainingConfig) -> list[str]:
    """Return what the base model of ``config`` cannot do of what the config asks, where the model is at hand."""
    family = family_at_hand(config)
    if family is None:
        return []
    return [
        *_method_problems(config, family),
        *_setting_problems(config, family),
        *_reach_problems(config, family, ModelSource.of(config).config_folder),
        *sampling_problems(config, config.num_inference_steps),
    ]


def _method_problems(config: TrainingConfig, family: BackboneEntry) -> Iterator[str]:
    """Yield why the method, or what it learns beside its weights, cannot be on this family."""
    if config.method == "custom-diffusion" and not family.is_unet:
        yield (
            f"custom-diffusion trains the cross-attention of a U-Net, and a {family.title} has none: "
            "use dreambooth-lora"
        )
    elif config.placeholder_token and family.learns_no_token:
        remedy = "drop it and give an --instance_prompt"
        if config.method != "dreambooth-lora":
            remedy = "train dreambooth-lora on an --instance_prompt alone"
        yield f"placeholder_token cannot be learned on a {family.title}, for {family.learns_no_token}: {remedy}"
    elif config.num_vectors > 1 and not family.expands_tokens:
        message = f"num_vectors must be 1 on a {family.title}, whose pipeline does not write out several tokens for"
        yield f"{message} every text encoder, got {config.num_vectors}: drop it"
    concepts = len(config.placeholder_tokens)
    if config.method == "custom-diffusion" and concepts > 1 and family.has_several_encoders:
        message = f"custom-diffusion learns one concept at a time on a {family.title}, got {concepts}"
        yield f"{message}: train them one by one"
    if getattr(config, "train_text_encoder", False) and not family.has_clip:
        yield f"train_text_encoder adapts a CLIP, and a {family.title} has none: drop it"
    targets = getattr(config, "lora_targets", None)
    if targets and family.lora_targets and targets not in family.lora_targets:
        choices = ", ".join(family.lora_targets)
        yield f"lora_targets of {family.title} must be one of {choices}, got {targets!r}: choose one of them"


def _setting_problems(config: TrainingConfig, family: BackboneEntry) -> Iterator[str]:
    """Yield the settings of images and memory that this family does not take."""
    if config.resolution % 8 == 0 and config.resolution % family.multiple:
        multiple = family.multiple * max(1, round(config.resolution / family.multiple))
        message = f"resolution must be a multiple of {family.multiple} on a {family.title}, got {config.resolution}"
        yield f"{message}: try {multiple}"
    for height, width in valid_buckets(config.aspect_ratio_buckets, config.resolution):
        if height % family.multiple or width % family.multiple:
            message = f"aspect_ratio_buckets must have multiples of {family.multiple} on a {family.title}"
            yield f"{message}, got {height},{width}: correct it"
    if config.snr_gamma and not family.is_unet:
        yield f"snr_gamma is for models that predict noise, and a {family.title} matches flows: use loss_weighting"
    if config.loss_weighting != "none" and family.is_unet:
        message = f"loss_weighting is for models that match flows, and a {family.title} predicts noise"
        yield f"{message}, got {config.loss_weighting}: use snr_gamma"
    if config.attention_slicing and not family.is_unet:
        yield f"attention_slicing is for a U-Net, and a {family.title} has none: drop it"
    if config.validation_scheduler != "model" and not family.is_unet:
        scheduler = config.validation_scheduler
        yield f"validation_scheduler must be model on a {family.title}, which matches flows, got {scheduler}: drop it"


def _reach_problems(config: TrainingConfig, family: BackboneEntry, folder: Path) -> Iterator[str]:
    """Yield the sizes of images that the positions of the model in ``folder`` do not reach."""
    largest = _largest_side(family, folder)
    rule = f"must be at most {largest} on this {family.title}, whose positions reach no further"
    if config.resolution > largest:
        yield f"resolution {rule}, got {config.resolution}: try {largest}"
        return
    buckets = valid_buckets(config.aspect_ratio_buckets, config.resolution)
    if too_large := [size for size in buckets if max(size) > largest]:
        height, width = max(too_large, key=max)
        yield f"sides in aspect_ratio_buckets {rule}, got {height},{width}: lower resolution, or name smaller sizes"


def drops_out(config: TrainingConfig) -> bool:
    """Return whether dropout is active in the run of ``config``, in a text encoder that learns a token."""
    family = family_at_hand(config)
    return family is not None and family.drops_out and config.placeholder_token is not None


def sampling_problems(config: TrainingConfig, steps: int) -> list[str]:
    """Return why the base model of ``config`` cannot generate in so many denoising steps: its schedule has fewer."""
    family = family_at_hand(config)
    if family is None or not family.is_unet:  # a flow has no steps of its own
        return []
    try:
        path = ModelSource.of(config).config_folder / "scheduler" / "scheduler_config.json"
        most = int(read_json(path, dict).get("num_train_timesteps", SAMPLING_STEPS.most))
    except (OSError, ValueError, TypeError):
        return []
    rule = f"num_inference_steps must be at most {most}, the steps of the model's schedule"
    return [f"{rule}, got {steps}: use fewer"] if steps > most else []


def _largest_side(family: BackboneEntry, folder: Path) -> float:
    """Return the longest side of images, in pixels, that a model has positions for; infinity if any side has them.

    Source: `PatchEmbed.cropped_pos_embed` of diffusers.
    """
    try:
        network, autoencoder = (read_json(folder / part / "config.json", dict) for part in (family.folders[0], "vae"))
        patches, patch = int(network["pos_embed_max_size"]), int(network["patch_size"])
        return patches * patch * int(2 ** (len(autoencoder["block_out_channels"]) - 1))
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return inf
