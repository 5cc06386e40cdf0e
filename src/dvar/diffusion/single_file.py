"""Base models in a single .safetensors file: which family one is of, by its header alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dvar.errors import ModelError, first_line
from dvar.files import regular_file

_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_SIZE_EMBEDDING = "model.diffusion_model.label_emb.0.0.weight"
_WIDE = {"F64", "F32", "F16", "BF16", "I64", "I32"}
"""Types of weights in full, and of the positions that older files hold beside them."""
_JOINT_BLOCK = "joint_blocks.{}.x_block.mlp.fc1.weight"
_PREFIX = "model.diffusion_model."
_NOT_READ = {
    "double_blocks.0.img_attn.norm.key_norm.scale": "FLUX.1, or of a model made from it that looks the same",
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "cap_embedder.1.weight": "Z-Image",
}
"""Tensors by which families are known whose single files are not read."""


@dataclass(frozen=True)
class FileKind:
    """A kind of single file.

    Attributes:
        pipeline: The class of its diffusers pipeline.
        title: Its family in prose.
        configs: The hub id of its configs and tokenizers; empty where models with different ones look the same.
        parts: How the names of tensors begin in the file, by the part of the pipeline; without the denoising network
            where it has two ways.
    """

    pipeline: str
    title: str
    configs: str
    parts: Mapping[str, str]


_VAE = "first_stage_model."
SD_1 = FileKind(
    "StableDiffusionPipeline",
    "Stable Diffusion 1.x",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    {"unet": "model.diffusion_model.", "vae": _VAE, "text_encoder": "cond_stage_model.transformer."},
)
SD_2 = FileKind(
    "StableDiffusionPipeline",
    "Stable Diffusion 2.x",
    "",
    {"unet": "model.diffusion_model.", "vae": _VAE, "text_encoder": "cond_stage_model.model."},
)
XL = FileKind(
    "StableDiffusionXLPipeline",
    "Stable Diffusion XL",
    "stabilityai/stable-diffusion-xl-base-1.0",
    {
        "unet": "model.diffusion_model.",
        "vae": _VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
)
_SD_3_PARTS = {
    "vae": _VAE,
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
SD_3, SD_35_MEDIUM, SD_35_LARGE = (
    FileKind("StableDiffusion3Pipeline", f"Stable Diffusion {version}", configs, _SD_3_PARTS)
    for version, configs in (
        ("3", "stabilityai/stable-diffusion-3-medium-diffusers"),
        ("3.5 medium", "stabilityai/stable-diffusion-3.5-medium"),
        ("3.5 large", "stabilityai/stable-diffusion-3.5-large"),
    )
)


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the type and the shape of each tensor in a safetensors file, by name.

    Raises:
        ModelError: It is no such file, or is damaged.
    """
    try:
        with safe_open(regular_file(file), "np") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} is damaged or no safetensors file ({first_line(error)}): copy it again") from error


def narrow_types(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
    """Return the types of the matrices of `read_header` that have fewer than 16 bits."""
    return sorted({dtype for dtype, shape in header.values() if dtype not in _WIDE and len(shape) > 1})


def find_kind(file: Path) -> FileKind:
    """Return what kind of single file this is, by the names of its tensors.

    Raises:
        ModelError: It is of no known kind.
    """
    if file.suffix != ".safetensors":
        message = f"{file} is no .safetensors file, and others, which may be pickles, are never read"
        raise ModelError(f"{message}: name such a file, a diffusers folder or a hub id")
    header = read_header(file)
    plain = {name.removeprefix(_PREFIX): shape for name, (_, shape) in header.items()}
    if _JOINT_BLOCK.format(0) in plain:
        return _find_kind_of_3(plain)
    if _UNET not in header:
        raise ModelError(f"{file} is {_describe_other(plain)}")
    if any(name.startswith("conditioner.embedders.0.model.") for name in header):
        raise ModelError(f"{file} is a refiner, which continues images of another model: name the base model")
    if _SIZE_EMBEDDING in header:
        return XL
    return SD_2 if any(name.startswith(SD_2.parts["text_encoder"]) for name in header) else SD_1


def _find_kind_of_3(shapes: Mapping[str, tuple[int, ...]]) -> FileKind:
    """Return which Stable Diffusion 3 or 3.5 has these tensors: by its depth, and the grid of its positions.

    Source: `infer_diffusers_model_type` of diffusers.
    """
    if _JOINT_BLOCK.format(37) in shapes:
        return SD_35_LARGE
    return SD_35_MEDIUM if shapes.get("pos_embed", (0, 0, 0))[1] == 384 * 384 else SD_3


def _describe_other(names: Collection[str]) -> str:
    """Return what a file with these tensors is, and what to name instead."""
    for name, title in _NOT_READ.items():
        if name in names:
            return f"of {title}, and is not read: name its diffusers folder or its hub id"
    lora = any("lora" in name for name in names)
    kind = "a LoRA" if lora else "no checkpoint of Stable Diffusion 1.x, 2.x, XL, 3 or 3.5"
    return f"{kind}: name the checkpoint of a base model, or a diffusers folder"


def missing_parts(file: Path) -> list[str]:
    """Return the parts of the pipeline that a single file does not hold.

    Raises:
        ModelError: As `find_kind`.
    """
    header = read_header(file)
    parts = find_kind(file).parts.items()
    return [part for part, start in parts if not any(name.startswith(start) for name in header)]


def file_problems(file: Path) -> list[str]:
    """Return what is wrong with a single file by itself."""
    try:
        kind, header = find_kind(file), read_header(file)
    except ModelError as error:
        return [str(error)]
    problems = []
    if narrow := narrow_types(header):
        message = f"{file} must hold weights of 16 or 32 bits, got {', '.join(narrow)}"
        problems.append(f"{message}: name the full checkpoint; --quantize makes it smaller")
    channels = header[_UNET][1][1] if _UNET in header else 0
    if channels > 4:
        message = f"{file} must be a model from text to image, and its U-Net reads {channels} channels"
        problems.append(f"{message}, as for inpainting: name the base model")
    if kind is XL and channels == 4 and "edm_mean" in header:
        problems.append(f"{file} is of Playground, whose noise is another: name a Stable Diffusion XL")
    return problems
