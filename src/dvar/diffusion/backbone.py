"""Backbones: what training and sampling ask of a base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dvar.config.training import Sampler
from dvar.diffusion import tokens
from dvar.diffusion.families import find_family
from dvar.diffusion.source import ModelSource, as_source
from dvar.diffusion.tokens import read_index

if TYPE_CHECKING:
    from typing import Self  # which Python 3.10 does not have

    import torch
    from PIL import Image
    from torch import Tensor, nn

    from dvar.diffusion.backbones.prompt_cache import States
    from dvar.diffusion.backbones.stock import TextTower
    from dvar.diffusion.objective import Schedule


class Backbone(Protocol):
    """A base model as training and sampling use it: frozen, in eval mode, on one device."""

    @property
    def title(self) -> str:
        """Its family in prose."""
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

    def generation_options(
        self, prompts: Sequence[str], guidance: float, negatives: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments with which the stock pipeline generates an image of each prompt at this guidance."""
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

    def encode_captions(self, input_ids: Tensor) -> Mapping[str, States]:
        """Return what each text encoder gives for captions [B, L], by its name; a row depends on its caption alone."""
        ...

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the prediction as `predict`, given what `encode_captions` returned, within `autocast`."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the scope in which the networks compute in their precision."""
        ...

    def prepare_training(self, captions: Tensor) -> None:
        """Bring what trains to the device; what does not train may read all captions, ids [n, L], once."""
        ...

    def sharded(self, shard: Callable[[nn.Module], None]) -> Self:
        """Return the model on its device, with the networks that are large handed to ``shard``, which splits them."""
        ...

    def release_encoders(self, generate: Callable[[], object], *, images: bool) -> None:
        """Give up what has read all captions, once it has read what ``generate`` generates, and all ``images``."""
        ...

    def generating(self, pipeline: Any) -> AbstractContextManager[None]:
        """Return the scope in which a stock pipeline generates."""
        ...


def load_backbone(
    name: str | Path | ModelSource,
    *,
    device: str | None = None,
    mixed_precision: str = "no",
    gradient_checkpointing: bool = False,
    attention_slicing: bool = False,
    compile: bool = False,
    quantize: str = "no",
    offload: bool = False,
) -> Backbone:
    """Return the base model in a diffusers folder, in a single file or behind a hub id.

    Args:
        name: The folder, the file or the hub id.
        device: The device; by default a GPU where there is one.
        mixed_precision: "bf16" or "fp16" keeps the denoising network in that precision and computes under autocast.
        gradient_checkpointing: Recompute activations in the backward pass.
        attention_slicing: Compute attention in slices.
        compile: Compile the denoising network at its first call.
        quantize: "nf4" or "int8" keeps most weights of the denoising network in 4 or 8 bits.
        offload: Have networks on the CPU while they are idle.

    Raises:
        ModelError: It cannot be loaded, or no backbone is registered for it.
    """
    source = as_source(name)
    backbone: Backbone = find_family(source.name, read_index(source)["_class_name"]).load(
        source,
        device=device,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        attention_slicing=attention_slicing,
        compile=compile,
        quantize=quantize,
        offload=offload,
    )
    return backbone


def load_tokenizer(name: str | Path | ModelSource) -> Any:
    """Return the tokenizer of the model in a folder, in a file or behind a hub id; torch is not imported for it.

    Raises:
        ModelError: There is none, or no backbone is registered for the model.
    """
    source = as_source(name)
    return find_family(source.name, read_index(source)["_class_name"]).load_tokenizer(source.config_folder)


def load_long_tokenizer(name: str | Path | ModelSource) -> Any:
    """Return the tokenizer of the text encoder that reads what the CLIPs beside it cut off; None where there is none.

    Raises:
        ModelError: It cannot be read, or no backbone is registered for the model.
    """
    source = as_source(name)
    family = find_family(source.name, read_index(source)["_class_name"])
    return tokens.load_long_tokenizer(source.config_folder, *family.long_tokenizer) if family.long_tokenizer else None
