"""Base models in a single .safetensors file: which family one is of, by its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dvar.errors import ModelError, first_line
from dvar.files import regular_file

_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_SIZE_EMBEDDING = "model.diffusion_model.label_emb.0.0.weight"
_FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class FileKind:
    """A kind of single file.

    Attributes:
        pipeline: The class of its diffusers pipeline.
        title: Its family in prose.
        configs: The hub id of its configs and tokenizers.
        parts: How the names of tensors begin in the file, by the part of the pipeline.
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
    "stabilityai/stable-diffusion-2-1",
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


def find_kind(file: Path) -> FileKind:
    """Return what kind of single file this is, by the names of its tensors.

    Raises:
        ModelError: It is of no known kind.
    """
    if file.suffix != ".safetensors":
        message = f"{file} is no .safetensors file, and others, which may be pickles, are never read"
        raise ModelError(f"{message}: name such a file, a diffusers folder or a hub id")
    header = read_header(file)
    if _UNET not in header:
        kind = (
            "a LoRA" if any("lora" in name for name in header) else "no checkpoint of Stable Diffusion 1.x, 2.x or XL"
        )
        raise ModelError(f"{file} is {kind}: name the checkpoint of a base model, or a diffusers folder")
    if any(name.startswith("conditioner.embedders.0.model.") for name in header):
        raise ModelError(f"{file} is a refiner, which continues images of another model: name the base model")
    if _SIZE_EMBEDDING in header:
        return XL
    return SD_2 if any(name.startswith(SD_2.parts["text_encoder"]) for name in header) else SD_1


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
    if strange := sorted({dtype for dtype, shape in header.values() if dtype not in _FLOATS and len(shape) > 1}):
        message = f"{file} must hold weights of 16 or 32 bits, got {', '.join(strange)}"
        problems.append(f"{message}: name the full checkpoint; --quantize makes it smaller")
    channels = header[_UNET][1][1]
    if channels > 4:
        message = f"{file} must be a model from text to image, and its U-Net reads {channels} channels"
        problems.append(f"{message}, as for inpainting: name the base model")
    if kind is XL and channels == 4 and "edm_mean" in header:
        problems.append(f"{file} is of Playground, whose noise is another: name a Stable Diffusion XL")
    return problems
