"""What the backbones share: the networks of a stock diffusers pipeline, loaded, frozen and put to use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from dvar.config.training import Sampler
from dvar.diffusion.backbones.prompt_cache import PromptCache, States
from dvar.diffusion.backbones.weights_digest import digest_of_weights
from dvar.diffusion.devices import best_device, leave_autocast
from dvar.diffusion.loading import loading_errors, stored_dtypes
from dvar.diffusion.objective import Schedule
from dvar.diffusion.quantization import quantize_linears
from dvar.diffusion.single_file import missing_parts
from dvar.diffusion.source import ModelSource, as_source
from dvar.diffusion.tokens import read_index
from dvar.errors import ModelError

if TYPE_CHECKING:
    from typing import Self  # which Python 3.10 does not have

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T5_METHOD = "_get_t5_prompt_embeds"
"""The method by which a stock pipeline with several text encoders reads T5 alone."""
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
        precision: The arithmetic of the denoising network and the text encoders. Under bfloat16 the text encoders that
            learn no word have their weights in it too; those of other networks stay in float32.
        digest: The SHA-256 of the networks' weights, as they were loaded, and of the noise schedule. It depends neither
            on the device nor on the precision, nor on what is learned later.
        workplace: The device on which its networks compute; by default where the denoising network is.
        offload: Whether networks are on the CPU while they are idle.
        cache: What frozen text encoders gave for prompts.
    """

    stock: Any
    precision: torch.dtype = torch.float32
    digest: str = ""
    workplace: torch.device | None = None
    offload: bool = False
    cache: PromptCache = field(default_factory=PromptCache)

    pipeline_class: ClassVar[str]
    title: ClassVar[str]
    denoiser_name: ClassVar[str] = "unet"
    embeds_keys: ClassVar[Mapping[str, str | None]] = MappingProxyType({"text_encoder": ""})
    """The `TextTower.embeds_key` of each text encoder."""
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
        name: str | Path | ModelSource,
        *,
        device: str | None = None,
        mixed_precision: str = "no",
        gradient_checkpointing: bool = False,
        attention_slicing: bool = False,
        compile: bool = False,
        quantize: str = "no",
        offload: bool = False,
    ) -> Self:
        """Return the model in a diffusers folder, in a single file or behind a hub id.

        Args:
            name: The folder, the file or the hub id.
            device: The device; by default a GPU where there is one.
            mixed_precision: "bf16" or "fp16" keeps the denoising network's weights in that precision and computes under
                autocast.
            gradient_checkpointing: Recompute its activations in the backward pass.
            attention_slicing: Compute its attention in slices.
            compile: Compile it at its first call.
            quantize: "nf4" or "int8" keeps the weights of its blocks in 4 or 8 bits.
            offload: Have networks on the CPU while they are idle; `prepare_training` brings what trains to the device.

        Raises:
            ModelError: It cannot be loaded, or is no model of this family.
        """
        precision, target = PRECISIONS[mixed_precision], torch.device(device or best_device())
        source = as_source(name)
        with loading_errors(source.name, f"{cls.title} model"):
            backbone = cls(cls._load_stock(source, precision), precision)
            backbone.check(source.name)
            networks = (*(tower.encoder for tower in backbone.towers), backbone.vae, backbone.denoiser)
            for network in networks:
                network.requires_grad_(False).eval()
            for key in (key for network in networks for key, part in network.state_dict().items() if part.is_meta):
                raise ModelError(f"{name} lacks weights, {key} among them: copy the model again")
            backbone.check_values(source.name)
            digest = digest_of_weights(networks, backbone.noise)
            idle = torch.device("cpu") if offload else target
            if quantize != "no":
                quantize_linears(backbone.denoiser, quantize, precision, target, idle)
            for network in networks:  # each weight in its precision at once: a GPU need not hold them all in float32
                backbone.convert(network).to(idle)
        if precision is torch.float16:  # T5 leaves its range: diffusers keeps parts of it in float32
            for tower in backbone.towers:
                if tower.embeds_key is None:
                    leave_autocast(tower.encoder, target)
        denoiser = backbone.denoiser
        if gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        if attention_slicing:
            denoiser.set_attention_slice("auto")
        if compile:
            denoiser.compile()
        return replace(backbone, digest=digest, workplace=target, offload=offload)

    @classmethod
    def _load_stock(cls, source: ModelSource, precision: torch.dtype) -> Any:
        """Return the stock pipeline, each part in float32 or, where it ends in half precision, as it is stored."""
        pipeline_type = getattr(diffusers, cls.pipeline_class)
        if source.is_file:
            folder, index, absent = source.config_folder, read_index(source), dict.fromkeys(cls.absent_parts(source))
            parts = {
                part: getattr(diffusers if index[part][0] == "diffusers" else transformers, index[part][1])
                for part in missing_parts(Path(source.name))
                if part not in absent
            }
            rest = {part: kind.from_pretrained(folder / part, use_safetensors=True) for part, kind in parts.items()}
            rest |= absent
            return pipeline_type.from_single_file(
                source.name, config=str(folder), local_files_only=True, **cls.options, **rest
            )
        absent, folder = dict.fromkeys(cls.absent_parts(source)), source.fetch()
        halves = [cls.denoiser_name, *(part for part, key in cls.embeds_keys.items() if key is None)]
        dtypes = stored_dtypes(folder, halves) if precision is not torch.float32 else {}
        options: dict[str, Any] = {"torch_dtype": {**dtypes, "default": torch.float32}} if dtypes else {}
        return pipeline_type.from_pretrained(
            folder, use_safetensors=True, variant=source.variant, **options, **cls.options, **absent
        )

    def convert(self, network: Any) -> Any:
        """Return a network with its weights in the precision that they have in training."""
        frozen = [tower.encoder for tower in self.towers if tower.embeds_key is None]
        if network is self.denoiser:
            return network.to(self.precision)
        if network in frozen and self.precision is torch.bfloat16:
            for weight in network.parameters():  # and not what its positions are computed from, which are no weights
                weight.data = weight.data.to(self.precision)
            return network
        return network.to(torch.float32)

    @classmethod
    def absent_parts(cls, source: ModelSource) -> list[str]:
        """Return the optional parts that a model says it lacks: stock diffusers wants to be told."""
        optional = [
            part.replace("text_encoder", kind) for part in cls.optional for kind in ("text_encoder", "tokenizer")
        ]
        index = read_index(source) if optional else {}
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
                # One pass in place of a mask of all weights, which takes 30 times as long.
                if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():
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
    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, States]) -> Tensor:
        """Return the denoising network's prediction, [B, C, h, w].

        Args:
            noisy: Noisy latents, [B, C, h, w].
            times: The network's inputs for their timesteps, [B]: `Schedule.times`.
            states: What `encode_text` gave for their captions, by the name of the text encoder.
        """

    def encode_text(self, tower: TextTower, input_ids: Tensor) -> States:
        """Return what the denoising network reads of a text encoder's output for token ids [B, L], each [B, ...]."""
        return (tower.encoder(input_ids)[0],)

    def predict(self, noisy: Tensor, times: Tensor, input_ids: Tensor) -> Tensor:
        """Return the denoising network's prediction, [B, C, h, w], as `denoise`, under captions int64 [B, L]."""
        with self.autocast():
            return self.denoise(noisy, times, self.encode_captions(input_ids))

    def encode_captions(self, input_ids: Tensor) -> dict[str, States]:
        """Return what each text encoder gives for captions int64 [B, L], by its name.

        A text encoder that is not trained reads each caption once, and by itself.
        """
        return {
            tower.name: self.encode_text(tower, ids)
            if _is_trained(tower.encoder)
            else self.cache.read(tower.name, ids, partial(self.encode_text, tower))
            for tower, ids in zip(self.towers, self._split(input_ids), strict=True)
        }

    def prepare_training(self, captions: Tensor) -> None:
        """Bring what trains to the device, and have the text encoders that do not train read all captions.

        Args:
            captions: The token ids of all captions of the run, int64 [n, L].
        """
        for tower, ids in zip(self.towers, self._split(captions), strict=True):
            if _is_trained(tower.encoder):
                tower.encoder.to(self.device)
                continue
            with self._at_work(tower.encoder), self.autocast():
                self.cache.read(tower.name, ids.to(self.device), partial(self.encode_text, tower))
        self.denoiser.to(self.device)

    def sharded(self, shard: Callable[[nn.Module], None]) -> Self:
        """Return the model on its device, with the networks that are large handed to ``shard``, which splits them.

        These are the denoising network and the text encoders that learn no word.
        """
        whole = [self.vae, *(tower.encoder for tower in self.towers if tower.embeds_key is not None)]
        for network in self.modules:
            if network in whole:
                network.to(self.device)
            else:
                shard(network)
        return replace(self, offload=False)

    def release_encoders(self, generate: Callable[[], object], *, images: bool) -> None:
        """Give up the weights of the text encoders that do not train, which have read all captions.

        Args:
            images: Whether all images are encoded too, so that half the autoencoder goes as well.
            generate: Generates all images that the stock pipeline is still to generate, up to their first noise; see
                `dvar.diffusion.sampling.rehearse`.
        """
        pipeline_type, towers = type(self.stock), self.towers
        released = [tower for tower in towers if not _is_trained(tower.encoder)]
        if len(released) == len(towers) and hasattr(pipeline_type, "encode_prompt"):
            self.cache.methods.add("encode_prompt")
        elif hasattr(pipeline_type, T5_METHOD):
            self.cache.methods.add(T5_METHOD)
            released = [tower for tower in released if tower.embeds_key is None]
        else:
            released = []
        if released:
            generate()
        if images:
            self.vae.encoder = nn.Module()
        for tower in released:
            tower.encoder.to("meta")
        self.cache.released.update(tower.name for tower in released)

    @contextmanager
    def generating(self, pipeline: Any) -> Iterator[None]:
        """Have the parts of a stock pipeline on the device in a scope in which it generates."""
        if not self.offload or self.device.type == "cpu":
            yield
            return
        places = [(network, next(network.parameters()).device) for network in self.modules]
        pipeline.enable_model_cpu_offload(device=self.device)
        try:
            yield
        finally:
            pipeline.remove_all_hooks()
            for network, place in places:
                if place.type != "meta":
                    network.to(place)

    @contextmanager
    def _at_work(self, network: nn.Module) -> Iterator[None]:
        """Have a network on the device in a scope; afterwards it is on the CPU again if it is idle there."""
        if self.offload:
            network.to(self.device)
        yield
        if self.offload:
            network.to("cpu")

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
        if self.workplace is not None:
            return self.workplace
        weight: nn.Parameter = next(self.denoiser.parameters())
        return weight.device  # what diffusers' own `device` does takes a millisecond

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The networks: text encoders, denoising network, autoencoder."""
        return (*(tower.encoder for tower in self.towers), self.denoiser, self.vae)

    def pipeline(self, scheduler: Sampler = "model") -> Any:
        """Return a stock pipeline of the same networks, with the model's own scheduler or the named one."""
        sampler = type(self.scheduler) if scheduler == "model" else getattr(diffusers, scheduler)
        arguments = signature(type(self.stock)).parameters
        # Of its arguments diffusers counts those without a default as components; others may matter as much.
        own = {name: value for name, value in self.stock.config.items() if name in arguments}
        parts = {**own, **self.stock.components, "scheduler": sampler.from_config(self.scheduler.config)}
        pipeline = type(self.stock)(**{**parts, **self.options, **dict.fromkeys(self.cache.released)})
        pipeline.set_progress_bar_config(disable=True)
        for name in self.cache.methods:
            setattr(pipeline, name, self.cache.remembering(getattr(pipeline, name)))
        return pipeline

    def generation_options(
        self, prompts: Sequence[str], guidance: float, negatives: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return the arguments with which the stock pipeline generates an image of each prompt at this guidance.

        Args:
            prompts: The prompts.
            guidance: Weight of guidance, as the stock pipeline counts it.
            negatives: What guidance leads away from, for each prompt; by default what the pipeline takes.
        """
        options = {"prompt": list(prompts), "guidance_scale": guidance}
        return options if negatives is None else {**options, "negative_prompt": list(negatives)}

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the posterior moments of RGB images, float32 [n, 2C, h, w] on the CPU: means, then log-variances.

        Images are encoded in float32 and one at a time, so that neither precision nor batch changes their moments.
        """
        with self._at_work(self.vae):
            return torch.cat([self._moments(self._pixels(image)).cpu() for image in images])

    def _moments(self, pixels: Tensor) -> Tensor:
        """Return the posterior moments of an image's pixels [1, 3, H, W], [1, 2C, h, w]."""
        moments: Tensor = self.vae.encode(pixels).latent_dist.parameters
        return moments

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


def _is_trained(network: nn.Module) -> bool:
    """Return whether anything in a network is trained."""
    return any(weight.requires_grad for weight in network.parameters())
