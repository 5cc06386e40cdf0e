"""Backbones: what training and sampling ask of a base model, and the registry of the families that have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dvar.config.training import Sampler
from dvar.diffusion.tokens import load_clip_tokenizer, read_index
from dvar.errors import ModelError
from dvar.registry import Registry

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from dvar.diffusion.backbones.stock import TextTower
    from dvar.diffusion.objective import Schedule


class Backbone(Protocol):
    """A base model as training and sampling use it: frozen, in eval mode, on one device."""

    @property
    def title(self) -> str:
        """Its family in prose."""
        ...

    @property
    def expands_tokens(self) -> bool:
        """Whether its stock pipeline writes out the tokens of a placeholder token that has several."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its first text encoder."""
        ...

    @property
    def text_encoder(self) -> Any:
        """Its first text encoder."""
        ...

    @property
    def towers(self) -> Sequence[TextTower]:
        """Its text encoders, each with its tokenizer."""
        ...

    @property
    def denoiser(self) -> Any:
        """The denoising network."""
        ...

    @property
    def denoiser_name(self) -> str:
        """The name of the denoising network in the pipeline, such as "unet"."""
        ...

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """The matrices of the denoising network that LoRA adapts, under diffusers' names, by choice."""
        ...

    @property
    def digest(self) -> str:
        """The SHA-256 of the weights, as they were loaded, and of the noise schedule."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        ...

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All its networks."""
        ...

    @property
    def schedule(self) -> Schedule:
        """The noise schedule under which it was trained."""
        ...

    def pipeline(self, scheduler: Sampler = "model") -> Any:
        """Return a stock diffusers pipeline of the same networks, with the model's own scheduler or the named one."""
        ...

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB images, float32 [n, 2C, h, w] on the CPU: means, then log-variances."""
        ...

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts``, int64 [n, L]."""
        ...

    def predict(self, noisy: Tensor, times: Tensor, input_ids: Tensor) -> Tensor:
        """Return the prediction, [B, C, h, w], for noisy latents at `Schedule.times` [B] under captions [B, L]."""
        ...

    def autocast(self) -> torch.autocast:
        """Return the scope in which the networks compute in their precision."""
        ...


@dataclass(frozen=True)
class BackboneEntry:
    """A family of base models, as the registry holds it.

    Attributes:
        pipeline: The class of its diffusers pipelines, as model_index.json names it; the name in the registry.
        title: The family in prose.
        load: Loads a model; called with what `load_backbone` is called with. It imports what it needs when it is
            called, so that the registry loads without torch.
        load_tokenizer: Loads the tokenizer of a folder or hub id, without torch.
        folders: The folders that a model of it must have.
    """

    pipeline: str
    title: str
    load: Callable[..., Backbone]
    load_tokenizer: Callable[[str | Path], Any]
    folders: tuple[str, ...]


def _load_stable_diffusion(name: str | Path, **options: Any) -> Backbone:
    from dvar.diffusion.backbones.stable_diffusion import StableDiffusion

    return StableDiffusion.load(name, **options)


def _load_stable_diffusion_xl(name: str | Path, **options: Any) -> Backbone:
    from dvar.diffusion.backbones.stable_diffusion_xl import StableDiffusionXL

    return StableDiffusionXL.load(name, **options)


def _load_stable_diffusion_3(name: str | Path, **options: Any) -> Backbone:
    from dvar.diffusion.backbones.stable_diffusion_3 import StableDiffusion3

    return StableDiffusion3.load(name, **options)


_ONE_CLIP = ("vae", "text_encoder", "tokenizer", "scheduler")
_TWO_CLIPS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")

BACKBONES: Registry[BackboneEntry] = Registry("backbone", "dvar.backbones")
"""Every family by the class of its pipelines. Other packages add theirs by an entry point of "dvar.backbones"."""
for entry in (
    BackboneEntry(
        "StableDiffusionPipeline",
        "Stable Diffusion 1.x or 2.x",
        _load_stable_diffusion,
        load_clip_tokenizer,
        ("unet", *_ONE_CLIP),
    ),
    BackboneEntry(
        "StableDiffusionXLPipeline",
        "Stable Diffusion XL",
        _load_stable_diffusion_xl,
        load_clip_tokenizer,
        ("unet", *_TWO_CLIPS),
    ),
    BackboneEntry(
        "StableDiffusion3Pipeline",
        "Stable Diffusion 3 or 3.5",
        _load_stable_diffusion_3,
        load_clip_tokenizer,
        ("transformer", *_TWO_CLIPS),
    ),
):
    BACKBONES.register(entry.pipeline, entry)


def load_backbone(
    name: str | Path,
    *,
    device: str | None = None,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    attention_slicing: bool = False,
    compile: bool = False,
) -> Backbone:
    """Return the base model in a diffusers folder or behind a hub id.

    Args:
        name: The folder or hub id.
        device: The device; by default a GPU where there is one.
        mixed_precision: "bf16" or "fp16" keeps the denoising network in that precision and computes under autocast.
        gradient_checkpointing: Recompute activations in the backward pass.
        attention_slicing: Compute attention in slices.
        compile: Compile the denoising network at its first call.

    Raises:
        ModelError: It cannot be loaded, or no backbone is registered for it.
    """
    return find_family(name, read_index(name)["_class_name"]).load(
        name,
        device=device,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        attention_slicing=attention_slicing,
        compile=compile,
    )


def load_tokenizer(name: str | Path) -> Any:
    """Return the tokenizer of the model in a diffusers folder or behind a hub id; torch is not imported for it.

    Raises:
        ModelError: There is none, or no backbone is registered for the model.
    """
    return find_family(name, read_index(name)["_class_name"]).load_tokenizer(name)


def find_family(name: str | Path, pipeline: str) -> BackboneEntry:
    """Return the family of the model ``name``, by the class of its pipeline.

    Raises:
        ModelError: No backbone is registered for it.
    """
    if pipeline not in BACKBONES:
        titles = ", ".join(entry.title for entry in BACKBONES.values())
        raise ModelError(f"the model must be one of {titles}; {name} is a {pipeline}: choose another")
    return BACKBONES[pipeline]
