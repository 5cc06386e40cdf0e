"""Backbones: what training and sampling ask of a base model, and the registry of the families that have one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dvar.config.training import Sampler
from dvar.diffusion.tokens import load_clip_tokenizer, pipeline_class
from dvar.errors import ModelError
from dvar.registry import Registry

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from dvar.diffusion.objective import Schedule


class Backbone(Protocol):
    """A base model as training and sampling use it: frozen, in eval mode, on one device."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, to which methods add placeholder tokens."""
        ...

    @property
    def text_encoder(self) -> Any:
        """The network that reads prompts."""
        ...

    @property
    def unet(self) -> Any:
        """The denoising network."""
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

    def predict(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Return the prediction, [B, C, h, w], for noisy latents at timesteps [B] under captions [B, L]."""
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
    """

    pipeline: str
    title: str
    load: Callable[..., Backbone]
    load_tokenizer: Callable[[str | Path], Any]


def _load_stable_diffusion(name: str | Path, **options: Any) -> Backbone:
    """Return a Stable Diffusion."""
    from dvar.diffusion.stable_diffusion import StableDiffusion

    return StableDiffusion.load(name, **options)


BACKBONES: Registry[BackboneEntry] = Registry("backbone", "dvar.backbones")
"""Every family by the class of its pipelines. Other packages add theirs by an entry point of "dvar.backbones"."""
BACKBONES.register(
    "StableDiffusionPipeline",
    BackboneEntry(
        "StableDiffusionPipeline", "Stable Diffusion 1.x or 2.x", _load_stable_diffusion, load_clip_tokenizer
    ),
)


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
    return _find_entry(name).load(
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
    return _find_entry(name).load_tokenizer(name)


def _find_entry(name: str | Path) -> BackboneEntry:
    """Return the entry of a model, by the class of its pipeline."""
    pipeline = pipeline_class(name)
    if pipeline not in BACKBONES:
        titles = " or a ".join(entry.title for entry in BACKBONES.values())
        raise ModelError(f"the model must be a {titles}, {name} is a {pipeline}: choose another")
    return BACKBONES[pipeline]
