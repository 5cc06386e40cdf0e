"""The families of base models: what is known of each without loading a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvar.diffusion.tokens import load_bert_tokenizer, load_clip_tokenizer, load_language_tokenizer
from dvar.errors import ModelError
from dvar.registry import Registry

FROM_IMAGES = (
    *("Img2Img", "Inpaint", "Fill", "Edit", "Kontext", "Pix2Pix", "Upscale", "SuperResolution", "Depth2Img"),
    *("Variation", "Control", "Redux", "Adapter", "Refiner"),
)
VIDEO = (
    *("Video", "Wan", "LTX", "Mochi", "Animate", "Latte", "Allegro", "SkyReels", "Skyreels", "Helios", "T2V", "I2V"),
    *("World", "Cosmos2_5", "Cosmos3"),
)
"""Parts of the names of pipelines that start from an image, and of those that make videos."""


@dataclass(frozen=True)
class BackboneEntry:
    """A family of base models, as the registry holds it.

    Attributes:
        pipeline: The class of its diffusers pipelines, as model_index.json names it; the name in the registry.
        title: The family in prose.
        load: Loads a model, a `Backbone`; called with what `load_backbone` is called with. It imports what it needs
            when it is called, so that the registry loads without torch.
        load_tokenizer: Loads the tokenizer of a folder or hub id, without torch.
        folders: The folders that a model of it must have, the denoising network's first.
        kinds: What the config of a part may say that it is, by folder: a class of diffusers, a type of transformers.
        widths: Sizes that must agree, each as (size, sizes that sum to it), such as "unet.cross_attention_dim".
        optional: The folders that a model of it may lack; where model_index.json names the first of them, it has all.
        multiple: What the side of its images is a multiple of, in pixels.
        lora_targets: The names of its choices of matrices for LoRA; none are checked before loading if empty.
        learns_no_token: The reason if no placeholder token can be learned; empty if one can.
        expands_tokens: Whether its stock pipeline writes out the tokens of a placeholder token that has several, for
            every text encoder.
        drops_out: Whether a text encoder has dropout while it learns a token.
        long_tokenizer: The folder of the tokenizer of an encoder that reads what the CLIPs beside it cut off, and how
            many tokens it reads; None if there is no such encoder.
        reads_negatives: Whether its stock pipeline takes a negative prompt.
        guides_above: The guidance up to which its stock pipeline leaves a negative prompt unused.
        settings: What takes the place of the paper's settings, which are for Stable Diffusion 1.5: the steps and the
            guidance of its stock pipeline, the resolution of diffusers' script.
        lora_settings: The same for LoRA alone, as by default in diffusers' script.
        few_steps: The steps of a model of it that is distilled to few.
    """

    pipeline: str
    title: str
    load: Callable[..., Any]
    load_tokenizer: Callable[[str | Path], Any]
    folders: tuple[str, ...]
    kinds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    widths: tuple[tuple[str, tuple[str, ...]], ...] = ()
    optional: tuple[str, ...] = ()
    multiple: int = 8
    lora_targets: tuple[str, ...] = ()
    learns_no_token: str = ""
    expands_tokens: bool = True
    drops_out: bool = False
    long_tokenizer: tuple[str, int] | None = None
    reads_negatives: bool = True
    guides_above: float = 1.0
    settings: Mapping[str, Any] = field(default_factory=dict)
    lora_settings: Mapping[str, Any] = field(default_factory=dict)
    few_steps: int = 4

    def parts_of(self, index: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the folders that a model must have by its model_index.json, the denoising network's first."""
        named = tuple(part for part in self.optional if index.get(part) not in (None, [None, None]))
        return (*self.folders, *(self.optional if named[:1] == self.optional[:1] else named))

    def settings_of(self, method: str, *, distilled: bool) -> dict[str, Any]:
        """Return what takes the place of the paper's settings for a method, on a model that is distilled or not."""
        few = {"num_inference_steps": self.few_steps, "guidance_scale": 0.0} if distilled else {}
        return {**self.settings, **(self.lora_settings if method == "dreambooth-lora" else {}), **few}

    @property
    def is_unet(self) -> bool:
        """Whether its denoising network is a U-Net, as far as is known."""
        return not self.folders or self.folders[:1] == ("unet",)

    @property
    def has_several_encoders(self) -> bool:
        """Whether it has several text encoders, as far as is known."""
        return "text_encoder_2" in self.folders

    @property
    def has_clip(self) -> bool:
        """Whether one of its text encoders is a CLIP."""
        return not self.kinds or any(kind == _CLIP for kind in self.kinds.values())


def _load_stable_diffusion(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.stable_diffusion import StableDiffusion

    return StableDiffusion.load(name, **options)


def _load_latent_diffusion(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.latent_diffusion import LatentDiffusion

    return LatentDiffusion.load(name, **options)


def _load_stable_diffusion_xl(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.stable_diffusion_xl import StableDiffusionXL

    return StableDiffusionXL.load(name, **options)


def _load_stable_diffusion_3(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.stable_diffusion_3 import StableDiffusion3

    return StableDiffusion3.load(name, **options)


def _load_flux(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.flux import Flux

    return Flux.load(name, **options)


def _load_flux2_klein(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.flux2_klein import Flux2Klein

    return Flux2Klein.load(name, **options)


def _load_z_image(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.z_image import ZImage

    return ZImage.load(name, **options)


def _load_qwen_image(name: str | Path, **options: Any) -> Any:
    from dvar.diffusion.backbones.qwen_image import QwenImage

    return QwenImage.load(name, **options)


_ONE_CLIP = ("vae", "text_encoder", "tokenizer", "scheduler")
_TWO_ENCODERS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_CLIP, _KL = ("clip_text_model", "clip"), ("AutoencoderKL",)
_UNET_TARGETS = ("attention", "cross-attention", "attention+gates")
_LANGUAGE_MODEL = (
    "a gradient would pass at each step through its text encoder, a language model of billions of weights, into which "
    "stock diffusers loads no word"
)
_CHANNELS = "transformer.in_channels"
_LORA: Mapping[str, Any] = {
    "learning_rate": 1e-4,
    "adam_weight_decay": 1e-4,
    "max_grad_norm": 1.0,
    "mixed_precision": "bf16",
    "gradient_checkpointing": True,
}
"""What LoRA takes by default in diffusers' scripts, and in their examples for a GPU."""

BACKBONES: Registry[BackboneEntry] = Registry("backbone", "dvar.backbones")
"""Every family by the class of its pipelines. Other packages add theirs by an entry point of "dvar.backbones"."""
for entry in (
    BackboneEntry(
        "StableDiffusionPipeline",
        "Stable Diffusion 1.x or 2.x",
        _load_stable_diffusion,
        load_clip_tokenizer,
        ("unet", *_ONE_CLIP),
        {"unet": ("UNet2DConditionModel",), "vae": _KL, "text_encoder": _CLIP},
        (
            ("unet.in_channels", ("vae.latent_channels",)),
            ("unet.cross_attention_dim", ("text_encoder.hidden_size",)),
        ),
        lora_targets=_UNET_TARGETS,
    ),
    BackboneEntry(
        "LDMTextToImagePipeline",
        "Latent Diffusion",
        _load_latent_diffusion,
        load_bert_tokenizer,
        ("unet", "vqvae", "bert", "tokenizer", "scheduler"),
        {"unet": ("UNet2DConditionModel",), "vqvae": _KL, "bert": ("ldmbert",)},
        (("unet.in_channels", ("vqvae.latent_channels",)), ("unet.cross_attention_dim", ("bert.d_model",))),
        lora_targets=_UNET_TARGETS,
        expands_tokens=False,
        drops_out=True,
        reads_negatives=False,
        settings={"resolution": 256},
    ),
    BackboneEntry(
        "StableDiffusionXLPipeline",
        "Stable Diffusion XL",
        _load_stable_diffusion_xl,
        load_clip_tokenizer,
        ("unet", *_TWO_ENCODERS),
        {"unet": ("UNet2DConditionModel",), "vae": _KL, "text_encoder": _CLIP, "text_encoder_2": _CLIP},
        (
            ("unet.in_channels", ("vae.latent_channels",)),
            ("unet.cross_attention_dim", ("text_encoder.hidden_size", "text_encoder_2.hidden_size")),
        ),
        lora_targets=_UNET_TARGETS,
        settings={"resolution": 1024, "guidance_scale": 5.0},
        lora_settings=_LORA,
    ),
    BackboneEntry(
        "StableDiffusion3Pipeline",
        "Stable Diffusion 3 or 3.5",
        _load_stable_diffusion_3,
        load_clip_tokenizer,
        ("transformer", *_TWO_ENCODERS),
        {
            "transformer": ("SD3Transformer2DModel",),
            "vae": _KL,
            "text_encoder": _CLIP,
            "text_encoder_2": _CLIP,
            "text_encoder_3": ("t5",),
        },
        (
            (_CHANNELS, ("vae.latent_channels",)),
            (
                "transformer.pooled_projection_dim",
                ("text_encoder.projection_dim", "text_encoder_2.projection_dim"),
            ),
            ("transformer.joint_attention_dim", ("text_encoder_3.d_model",)),
        ),
        optional=("text_encoder_3", "tokenizer_3"),
        multiple=16,
        lora_targets=("attention",),
        expands_tokens=False,
        long_tokenizer=("tokenizer_3", 256),
        settings={"num_inference_steps": 28, "guidance_scale": 7.0},
        lora_settings=_LORA,
    ),
    BackboneEntry(
        "FluxPipeline",
        "FLUX.1",
        _load_flux,
        load_clip_tokenizer,
        ("transformer", *_TWO_ENCODERS),
        {"transformer": ("FluxTransformer2DModel",), "vae": _KL, "text_encoder": _CLIP, "text_encoder_2": ("t5",)},
        (
            (_CHANNELS, ("vae.latent_channels",) * 4),
            ("transformer.pooled_projection_dim", ("text_encoder.hidden_size",)),
            ("transformer.joint_attention_dim", ("text_encoder_2.d_model",)),
        ),
        multiple=16,
        lora_targets=("attention",),
        expands_tokens=False,  # for T5, whose tokenizer does not know them, though it does for CLIP
        reads_negatives=False,
        long_tokenizer=("tokenizer_2", 512),
        settings={"num_inference_steps": 28, "guidance_scale": 3.5},
        lora_settings=_LORA,
    ),
    BackboneEntry(
        "Flux2KleinPipeline",
        "FLUX.2 klein",
        _load_flux2_klein,
        load_language_tokenizer,
        ("transformer", *_ONE_CLIP),
        {"transformer": ("Flux2Transformer2DModel",), "vae": ("AutoencoderKLFlux2",), "text_encoder": ("qwen3",)},
        (
            (_CHANNELS, ("vae.latent_channels",) * 4),
            ("transformer.joint_attention_dim", ("text_encoder.hidden_size",) * 3),
        ),
        multiple=16,
        lora_targets=("attention",),
        reads_negatives=False,
        learns_no_token=_LANGUAGE_MODEL,
        settings={"guidance_scale": 4.0},
        lora_settings=_LORA,
    ),
    BackboneEntry(
        "ZImagePipeline",
        "Z-Image",
        _load_z_image,
        load_language_tokenizer,
        ("transformer", *_ONE_CLIP),
        {"transformer": ("ZImageTransformer2DModel",), "vae": _KL, "text_encoder": ("qwen3",)},
        ((_CHANNELS, ("vae.latent_channels",)), ("transformer.cap_feat_dim", ("text_encoder.hidden_size",))),
        multiple=16,
        lora_targets=("attention",),
        learns_no_token=_LANGUAGE_MODEL,
        guides_above=0.0,
        settings={"guidance_scale": 5.0},
        lora_settings=_LORA,
        few_steps=8,
    ),
    BackboneEntry(
        "QwenImagePipeline",
        "Qwen-Image",
        _load_qwen_image,
        load_language_tokenizer,
        ("transformer", *_ONE_CLIP),
        {
            "transformer": ("QwenImageTransformer2DModel",),
            "vae": ("AutoencoderKLQwenImage",),
            "text_encoder": ("qwen2_5_vl",),
        },
        ((_CHANNELS, ("vae.z_dim",) * 4), ("transformer.joint_attention_dim", ("text_encoder.hidden_size",))),
        multiple=16,
        lora_targets=("attention",),
        learns_no_token=_LANGUAGE_MODEL,
        settings={"guidance_scale": 4.0},
        lora_settings=_LORA,
    ),
):
    BACKBONES.register(entry.pipeline, entry)


def find_family(name: str | Path, pipeline: str) -> BackboneEntry:
    """Return the family of the model ``name``, by the class of its pipeline.

    Raises:
        ModelError: No backbone is registered for it.
    """
    if pipeline not in BACKBONES:
        titles = ", ".join(entry.title for entry in BACKBONES.values())
        kind = ", which makes videos" if any(part in pipeline for part in VIDEO) else ""
        kind = ", which starts from an image" if any(part in pipeline for part in FROM_IMAGES) else kind
        raise ModelError(f"the model must be one of {titles}; {name} is a {pipeline}{kind}: choose another")
    return BACKBONES[pipeline]
