"""What memory a step of DreamBooth-LoRA takes on each family of base models, estimated at full size."""

# No weights are read and nothing is computed: tensors are fake, and have shapes and lifetimes alone. The forward and
# the backward pass are those of training, of one image in bfloat16, and the most bytes that are alive at once count.

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from peft import LoraConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from dvar.diffusion.backbones.flux import Flux
from dvar.diffusion.backbones.flux2_klein import Flux2Klein
from dvar.diffusion.backbones.qwen_image import QwenImage
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.diffusion.backbones.stable_diffusion_3 import StableDiffusion3
from dvar.diffusion.backbones.stable_diffusion_xl import StableDiffusionXL
from dvar.diffusion.backbones.z_image import ZImage
from dvar.diffusion.quantization import linears_in_blocks

FIGURES = Path(__file__).parents[1] / "docs" / "memory.json"
RESOLUTIONS, RANK, GIB, DTYPE = (512, 1024), 4, 2**30, torch.bfloat16
CLIP_L, CLIP_G, T5, QWEN3_4B, QWEN3_8B, QWEN_VL = 0.123, 0.695, 4.762, 4.022, 8.191, 8.292
"""Billions of weights of the text encoders, by their configs."""


KL = partial(
    diffusers.AutoencoderKL,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
)
KL_4, KL_16 = partial(KL, latent_channels=4), partial(KL, latent_channels=16)


@dataclass(frozen=True)
class Model:
    """A base model at full size.

    Attributes:
        name: Its name.
        backbone: Its backbone.
        network: Builds its denoising network.
        channels: The channels of its latents, as training has them.
        factor: Pixels of a latent's side.
        states: The shapes of what its text encoders give for a caption.
        autoencoder: Builds its autoencoder.
        latents: The shape of the latents that it decodes, without height and width.
        frozen, clips: Billions of weights of encoders that learn no word, and of those that can, each.
    """

    name: str
    backbone: type[Any]
    network: Callable[[], Any]
    channels: int
    factor: int
    states: Mapping[str, tuple[tuple[int, ...], ...]]
    autoencoder: Callable[[], Any] = KL_16
    latents: tuple[int, ...] = (1, 16)
    clips: tuple[float, ...] = ()
    frozen: tuple[float, ...] = ()
    parts: Mapping[str, Any] = field(default_factory=dict)


class AllText(ZImage):
    """A Z-Image whose captions have one length: fake tensors cannot be selected by their values."""

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, Any]) -> Tensor:
        """Return the transformer's prediction."""
        return super().denoise(noisy, times, {"text_encoder": (states["text_encoder"][0], [slice(None)] * len(noisy))})


class WholeText(QwenImage):
    """A Qwen-Image whose captions have one length."""

    def denoise(self, noisy: Tensor, times: Tensor, states: Mapping[str, Any]) -> Tensor:
        """Return the transformer's prediction."""
        mask = SimpleNamespace(sum=lambda dim: SimpleNamespace(max=lambda: states["text_encoder"][0].shape[1]))
        ones = _Ones(mask)
        return super().denoise(noisy, times, {"text_encoder": (states["text_encoder"][0], ones)})


class _Ones:
    """A mask of ones whose values are known."""

    def __init__(self, mask: Any) -> None:
        self.sum = mask.sum

    def __getitem__(self, index: Any) -> Any:
        return self

    def all(self) -> bool:
        """Return that all are ones."""
        return True


XL = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "sample_size": 128,
}
SD3 = {
    "sample_size": 128,
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
LARGE = {**SD3, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
KLEIN = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
KLEIN_9B = {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288}
CLIPS = {"text_encoder": ((77, 768), (768,)), "text_encoder_2": ((77, 1280), (1280,))}
SD3_STATES = {**CLIPS, "text_encoder_3": ((256, 4096),)}
VAE = {"vae": SimpleNamespace(config=SimpleNamespace(block_out_channels=(128, 256, 512, 512)))}

MODELS = (
    Model(
        "Stable Diffusion 1.5",
        StableDiffusion,
        partial(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768),
        4,
        8,
        {"text_encoder": ((77, 768),)},
        KL_4,
        (1, 4),
        clips=(CLIP_L,),
    ),
    Model(
        "Stable Diffusion XL",
        StableDiffusionXL,
        partial(diffusers.UNet2DConditionModel, **XL),
        4,
        8,
        CLIPS,
        KL_4,
        (1, 4),
        clips=(CLIP_L, CLIP_G),
        parts=VAE,
    ),
    Model(
        "Stable Diffusion 3 medium",
        StableDiffusion3,
        partial(diffusers.SD3Transformer2DModel, **SD3),
        16,
        8,
        SD3_STATES,
        clips=(CLIP_L, CLIP_G),
        frozen=(T5,),
    ),
    Model(
        "Stable Diffusion 3.5 large",
        StableDiffusion3,
        partial(diffusers.SD3Transformer2DModel, **LARGE),
        16,
        8,
        SD3_STATES,
        clips=(CLIP_L, CLIP_G),
        frozen=(T5,),
    ),
    Model(
        "FLUX.1 dev",
        Flux,
        partial(diffusers.FluxTransformer2DModel, guidance_embeds=True),
        16,
        8,
        {"text_encoder": ((768,),), "text_encoder_2": ((512, 4096),)},
        clips=(CLIP_L,),
        frozen=(T5,),
    ),
    Model(
        "FLUX.2 klein 4B",
        Flux2Klein,
        partial(diffusers.Flux2Transformer2DModel, guidance_embeds=False, **KLEIN),
        128,
        16,
        {"text_encoder": ((512, 7680),)},
        diffusers.AutoencoderKLFlux2,
        (1, 32),
        frozen=(QWEN3_4B,),
    ),
    Model(
        "FLUX.2 klein 9B",
        Flux2Klein,
        partial(diffusers.Flux2Transformer2DModel, guidance_embeds=False, **KLEIN_9B),
        128,
        16,
        {"text_encoder": ((512, 12288),)},
        diffusers.AutoencoderKLFlux2,
        (1, 32),
        frozen=(QWEN3_8B,),
    ),
    Model(
        "Z-Image",
        AllText,
        diffusers.ZImageTransformer2DModel,
        16,
        8,
        {"text_encoder": ((64, 2560),)},
        frozen=(QWEN3_4B,),
    ),
    Model(
        "Qwen-Image",
        WholeText,
        diffusers.QwenImageTransformer2DModel,
        16,
        8,
        {"text_encoder": ((64, 3584),)},
        diffusers.AutoencoderKLQwenImage,
        (1, 16, 1),
        frozen=(QWEN_VL,),
    ),
)


@dataclass(frozen=True)
class Step:
    """The memory of a step: weights of the network and of its blocks, bytes of all else at the peak."""

    weights: int
    in_blocks: int
    learned: int
    rest: int


def measure(model: Model, resolution: int, checkpointing: bool) -> Step:
    """Return what a step takes, of one image of ``resolution``."""
    with torch.device("meta"):
        network = model.network().requires_grad_(False)
        backbone = model.backbone(SimpleNamespace(**{model.backbone.denoiser_name: network, **model.parts}), DTYPE)
        weights = sum(part.numel() for part in network.parameters())
        linears = [layer.weight.numel() for _, layer in linears_in_blocks(network)]
        network.add_adapter(LoraConfig(r=RANK, target_modules=list(backbone.lora_targets["attention"])))
    with FakeTensorMode():
        materialise(network)
        learned = sum(part.numel() for part in network.parameters() if part.requires_grad)
        if checkpointing:
            network.enable_gradient_checkpointing()
        network.train()
        side = resolution // model.factor
        noisy = torch.randn(1, model.channels, side, side)
        states = {
            name: tuple(torch.randn(1, *shape).bfloat16() for shape in shapes) for name, shapes in model.states.items()
        }
        with LiveBytes([*network.parameters(), *network.buffers()]) as live:
            with backbone.autocast():
                prediction = backbone.denoise(noisy, torch.full([1], 500.0), states)
            torch.autograd.backward((prediction.float() - noisy).square().mean())
    return Step(weights, sum(linears), learned, live.peak)


def measure_decoding(model: Model, resolution: int) -> int:
    """Return the bytes beside its weights that the decoder takes for a sample of ``resolution``, in float32."""
    with torch.device("meta"):
        autoencoder = model.autoencoder().requires_grad_(False)
    with FakeTensorMode(), torch.no_grad():
        materialise(autoencoder, torch.float32)
        side = resolution // 8
        with LiveBytes([*autoencoder.parameters(), *autoencoder.buffers()]) as live:
            autoencoder.decode(torch.randn(*model.latents, side, side))
    return live.peak


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors which operations return hold at once, without what ``held`` holds."""

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.storages = [part.untyped_storage() for part in held]
        self.seen: Any = WeakIdKeyDictionary()
        for storage in self.storages:
            self.seen[storage] = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns, each storage once and for as long as it lives."""
        result = function(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, Tensor) and (storage := part.untyped_storage()) not in self.seen:
                self.seen[storage] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, size: int) -> None:
        """Count bytes no longer."""
        self.now -= size


def materialise(network: torch.nn.Module, frozen: torch.dtype = DTYPE) -> None:
    """Put fake tensors on the CPU in the place of those without a device, frozen weights in a precision."""
    for layer in network.modules():
        for name, part in list(layer.named_parameters(recurse=False)):
            dtype = torch.float32 if part.requires_grad else frozen
            setattr(layer, name, torch.nn.Parameter(torch.empty(part.shape, dtype=dtype), part.requires_grad))
        for parts in (layer._buffers, vars(layer)):
            for name, part in list(parts.items()):
                if isinstance(part, Tensor):
                    parts[name] = torch.empty(part.shape, dtype=part.dtype)


def main() -> None:
    """Measure the models that are named, or all of them for docs/memory.json, which docs/build/memory.py reads."""
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        if sys.argv[1:] and not any(word in model.name for word in sys.argv[1:]):
            continue
        for resolution in RESOLUTIONS:
            decoding = round(measure_decoding(model, resolution) / GIB, 2)
            for checkpointing in (False, True):
                step = measure(model, resolution, checkpointing)
                row = {"model": model.name, "resolution": resolution, "checkpointing": checkpointing}
                row |= {"weights": round(step.weights / 1e9, 2), "in_blocks": round(step.in_blocks / 1e9, 2)}
                row |= {"learned": round(step.learned / 1e9, 5), "rest_gib": round(step.rest / GIB, 2)}
                row |= {"decoding_gib": decoding}
                rows.append({**row, "clips": list(model.clips), "frozen": list(model.frozen)})
                print(rows[-1], flush=True)
                gc.collect()
    if not sys.argv[1:]:
        FIGURES.write_text("[\n" + ",\n".join(f" {json.dumps(row)}" for row in rows) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
