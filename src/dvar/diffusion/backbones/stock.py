"""What the backbones share: the networks of a stock diffusers pipeline, loaded, frozen and put to use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dvar.config.training import Sampler
from dvar.diffusion.devices import best_device
from dvar.diffusion.loading import loading_errors
from dvar.diffusion.objective import Schedule
from dvar.diffusion.tokens import read_index
from dvar.errors import ModelError

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class TextTower:
    """One of a model's text encoders.

    Attributes:
        name: Its name in the pipeline, such as "text_encoder_2".
        tokenizer: Turns prompts into its token ids.
        encoder: The network.
        length: The tokens of an encoded prompt, with its start and its end.
        embeds_key: The key of its vectors in a file of learned embeddings; empty where there is one text encoder, whose
            vectors go by their token; None for an encoder that learns none.
    """

    name: str
    tokenizer: Any
    encoder: Any
    length: int
    embeds_key: str | None = ""

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts``, int64 [n, length], cut or padded."""
        ids: Tensor = self.tokenizer(
            list(prompts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        return ids


@dataclass(frozen=True)
class StockBackbone(ABC):
    """The parts of a stock diffusers pipeline, frozen and in eval mode, on one device.

    Attributes:
        stock: The pipeline.
        precision: The arithmetic of the denoising network and the text encoders; weights other than the denoising
            network's stay in float32.
        digest: The SHA-256 of the networks' weights, as they were loaded, and of the noise schedule. It depends neither
            on the device nor on the precision, nor on what is learned later.
    """

    stock: Any
    precision: torch.dtype = torch.float32
    digest: str = ""

    pipeline_class: ClassVar[str]
    title: ClassVar[str]
    denoiser_name: ClassVar[str] = "unet"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": ""})
    """The `TextTower.embeds_key` of each text encoder."""
    expands_tokens: ClassVar[bool] = True
    """Whether the stock pipeline writes out the tokens of a placeholder token that has several."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Text encoders that a model may lack."""
    options: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Arguments of the pipeline beside its parts."""
    targets: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            "attention": _ATTENTION,
            "cross-attention": tuple(f"attn2.{name}" for name in _ATTENTION),
            "attention+gates": (*_ATTENTION, "ff.net.0.proj"),
        }
    )
    """What ``lora_targets`` returns, where that does not depend on the size of the model."""

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str | None = None,
        mixed_precision: str = "no",
        gradient_checkpointing: bool = False,
        attention_slicing: bool = False,
        compile: bool = False,
    ) -> Self:
        """Return the model in a diffusers folder or behind a hub id.

        Args:
            name: The folder or hub id.
            device: The device; by default a GPU where there is one.
            mixed_precision: "bf16" or "fp16" keeps the denoising network's weights in that precision and computes under
                autocast.
            gradient_checkpointing: Recompute its activations in the backward pass.
            attention_slicing: Compute its attention in slices.
            compile: Compile it at its first call.

        Raises:
            ModelError: It cannot be loaded, or is no model of this family.
        """
        with loading_errors(name, f"{cls.title} model"):
            absent = dict.fromkeys(cls.absent_parts(name))
            pipeline_type = getattr(diffusers, cls.pipeline_class)
            stock = pipeline_type.from_pretrained(name, use_safetensors=True, **cls.options, **absent)
            backbone = cls(stock, PRECISIONS[mixed_precision])
            backbone.check(name)
            networks = (*(tower.encoder for tower in backbone.towers), backbone.vae, backbone.denoiser)
            for network in networks:
                network.to(torch.float32).requires_grad_(False).eval()
            for key in (key for network in networks for key, part in network.state_dict().items() if part.is_meta):
                raise ModelError(f"{name} lacks weights, {key} among them: copy the model again")
            backbone.check_values(name)
            digest = _digest(networks, backbone.noise)
            for network in networks:  # each weight in its precision at once: a GPU need not hold them all in float32
                precision = PRECISIONS[mixed_precision] if network is backbone.denoiser else torch.float32
                network.to(device or best_device(), precision)
        denoiser = backbone.denoiser
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if attention_slicing:
            denoiser.set_attention_slice("auto")
        if compile:
            denoiser.compile()
        return cls(stock, PRECISIONS[mixed_precision], digest)

    @classmethod
    def absent_parts(cls, name: str | Path) -> list[str]:
        """Return the optional parts that the model ``name`` says it lacks: stock diffusers wants to be told."""
        optional = [
            part.replace("text_encoder", kind) for part in cls.optional for kind in ("text_encoder", "tokenizer")
        ]
        index = read_index(name) if optional else {}
        return [part for part in optional if index.get(part, [None])[0] is None]

    def check(self, name: str | Path) -> None:
        """Raise a `ModelError` if the model ``name`` lacks a part or cannot be trained as its family is."""
        missing = [part for part in self.embeds_keys if getattr(self.stock, part) is None and part not in self.optional]
        if missing:
            raise ModelError(f"{name} lacks its {missing[0]}: copy the model again, or choose another")

    def check_values(self, name: str | Path) -> None:
        """Raise a `ModelError` if a weight or the scale of the latents of the model ``name`` is of no use."""
        for network in self.modules:
            for key, weight in network.state_dict().items():
                if not weight.isfinite().all():
                    raise ModelError(
                        f"{name} holds weights that are not finite, {key} among them: copy the model again"
                    )
        scale = torch.as_tensor(self.schedule.scaling_factor, dtype=torch.float32)
        if not (scale.isfinite() & (scale > 0)).all():
            raise ModelError(
                f"the latents of a model are scaled by a number above 0, {name} scales them by {scale.tolist()}: "
                "copy the config of its autoencoder again"
            )

    @property
    @abstractmethod
    def noise(self) -> Tensor:
        """The noise at each timestep by its scheduler, [T]."""

    @property
    @abstractmethod
    def schedule(self) -> Schedule:
        """The noise and the target under which it was trained: those of its own scheduler."""

    @abstractmethod
    def predict(self, noisy: Tensor, times: Tensor, input_ids: Tensor) -> Tensor:
        """Return the denoising network's prediction, [B, C, h, w].

        Args:
            noisy: Noisy latents, [B, C, h, w].
            times: The network's inputs for their timesteps, [B]: `Schedule.times`.
            input_ids: Their captions, int64 [B, L].
        """

    @property
    def towers(self) -> tuple[TextTower, ...]:
        """Its text encoders."""
        return tuple(self._tower(name) for name in self.embeds_keys if getattr(self.stock, name) is not None)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of its first text encoder."""
        return self.stock.tokenizer

    @property
    def text_encoder(self) -> Any:
        """Its first text encoder."""
        return self.stock.text_encoder

    @property
    def lora_targets(self) -> Mapping[str, tuple[str, ...]]:
        """The matrices of the denoising network that LoRA adapts, under diffusers' names, by choice."""
        return self.targets

    @property
    def vae(self) -> Any:
        """The autoencoder."""
        return self.stock.vae

    @property
    def scheduler(self) -> Any:
        """The model's own scheduler."""
        return self.stock.scheduler

    @property
    def denoiser(self) -> Any:
        """The denoising network."""
        return getattr(self.stock, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        weight: nn.Parameter = next(self.denoiser.parameters())
        return weight.device  # what diffusers' own `device` does takes a millisecond

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The networks: text encoders, denoising network, autoencoder."""
        return (*(tower.encoder for tower in self.towers), self.denoiser, self.vae)

    def pipeline(self, scheduler: Sampler = "model") -> Any:
        """Return a stock pipeline of the same networks, with the model's own scheduler or the named one."""
        sampler = type(self.scheduler) if scheduler == "model" else getattr(diffusers, scheduler)
        parts = {**self.stock.components, "scheduler": sampler.from_config(self.scheduler.config)}
        pipeline = type(self.stock)(**{**parts, **self.options})
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def generation_options(self, prompts: Sequence[str], guidance: float) -> dict[str, Any]:
        """Return the arguments with which the stock pipeline generates an image of each prompt at this guidance."""
        return {"prompt": list(prompts), "guidance_scale": guidance}

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB images, float32 [n, 2C, h, w] on the CPU: means, then log-variances.

        Images are encoded in float32 and one at a time, so that neither precision nor batch changes their moments.
        """
        return torch.cat([self.vae.encode(self._pixels(image)).latent_dist.parameters.cpu() for image in images])

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts`` for all text encoders, one after the other, int64 [n, L]."""
        return torch.cat([tower.tokenize(prompts) for tower in self.towers], dim=1)

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the scope in which the networks compute in ``precision``; float32 leaves it without effect."""
        if not torch.amp.is_autocast_available(self.device.type):  # the meta device, which computes shapes alone
            return nullcontext()
        return torch.autocast(self.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _split(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the token ids of each text encoder."""
        return torch.split(input_ids, [tower.length for tower in self.towers], dim=1)

    def _tower(self, name: str) -> TextTower:
        tokenizer, encoder = getattr(self.stock, name.replace("text_encoder", "tokenizer")), getattr(self.stock, name)
        return TextTower(name, tokenizer, encoder, self._length(name, tokenizer, encoder), self.embeds_keys[name])

    def _length(self, name: str, tokenizer: Any, encoder: Any) -> int:
        """Return the tokens of an encoded prompt: as many as both the tokenizer and the encoder take."""
        return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return the pixels of an image in [-1, 1], float32 [1, 3, H, W] on the model's device."""
        values = torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
        return (values / 127.5 - 1).unsqueeze(0).to(self.device)


def _digest(networks: Sequence[nn.Module], noise: Tensor) -> str:
    """Return the SHA-256 of the networks' weights and of the noise schedule."""
    digest = sha256(noise.float().numpy().tobytes())
    for network in networks:
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()
