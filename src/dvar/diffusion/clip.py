"""A CLIP, which embeds texts and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dvar import mini
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.devices import best_device
from dvar.diffusion.loading import loading_errors, quiet_libraries
from dvar.errors import ModelError

TEXT_BATCH, IMAGE_BATCH = 256, 64
"""Texts and images in one forward pass."""
_MIN_NORM = 1e-12


@dataclass(frozen=True)
class Clip:
    """A CLIP with its tokenizer and its image processor, frozen, in float32."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path, *, tokenizer: str | Path | None = None, device: str | None = None) -> Clip:
        """Return the CLIP in a transformers folder or behind a hub id; weights are read from safetensors alone.

        Args:
            name: The folder or hub id.
            tokenizer: The folder or hub id of its tokenizer, where that is elsewhere.
            device: The device; by default a GPU where there is one.

        Raises:
            ModelError: It cannot be loaded, or its parts do not fit one another.
        """
        with loading_errors(name, "CLIP"):
            if (kind := transformers.AutoConfig.from_pretrained(name).model_type) != "clip":
                raise ModelError(f"the CLIP must be of type clip, {name} is of type {kind}: name another")
            processor = transformers.CLIPImageProcessorPil.from_pretrained(name)
            words = transformers.CLIPTokenizer.from_pretrained(tokenizer or name)
            model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
        clip = cls(Path(name).name, _freeze(model, device), words, processor)
        if problems := clip._misfits():
            raise ModelError(f"{name} does not fit: {'; '.join(problems)}: complete the folder or name another CLIP")
        return clip

    @classmethod
    def scoring(cls) -> Clip:
        """Return the bundled CLIP for scoring, which conditions no model.

        Raises:
            RefusedInput: The bundled model is not installed.
        """
        clip = cls.load(mini.judges() / "clip", tokenizer=mini.path() / "tokenizer")
        return cls("the bundled scorer", clip.model, clip.tokenizer, clip.processor)

    @classmethod
    def bundled(cls, backbone: Backbone) -> Clip:
        """Return the CLIP whose text encoder conditions the bundled model, which is ``backbone``, untouched."""
        folder = mini.path().parent / "judges" / "clip-conditioner"
        with quiet_libraries():
            model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
        words = {f"text_model.{name}": part.cpu() for name, part in backbone.text_encoder.state_dict().items()}
        rest = {name: part.float() for name, part in load_file(folder / "all-but-text.safetensors").items()}
        model.load_state_dict({**rest, **words})
        size, middle = model.config.vision_config.image_size, [0.5] * 3
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size=size, image_mean=middle, image_std=middle
        )
        return cls("the bundled conditioner", _freeze(model, str(backbone.device)), backbone.tokenizer, processor)

    @property
    def length(self) -> int:
        """The most tokens of a text, with its start and its end."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors of ``texts``, float32 [n, d] on the CPU; longer texts are cut to `length`."""
        parts = []
        for first in range(0, len(texts), TEXT_BATCH):
            tokens = self.tokenizer(
                list(texts[first : first + TEXT_BATCH]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            features = self.model.get_text_features(**tokens.to(self.model.device))
            parts.append(features.pooler_output.float().cpu())
        return normalize(torch.cat(parts))

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors of images of any size, float32 [n, d] on the CPU."""

        def embed(pixels: Tensor) -> Tensor:
            features: Tensor = self.model.get_image_features(pixel_values=pixels).pooler_output
            return features

        return embed_in_batches(images, self.processor, embed, self.model.device)

    def _misfits(self) -> list[str]:
        """Return which of its parts do not fit its model."""
        words, rows = len(self.tokenizer), self.model.config.text_config.vocab_size
        problems = image_size_problems(self.processor, self.model.config.vision_config.image_size)
        # Without files transformers makes up an empty vocabulary; a real one spells at least the 256 bytes.
        if not 256 <= words <= rows:
            problems.append(f"its tokenizer has {words} words, its text model reads {rows}")
        return problems


def normalize(vectors: Tensor) -> Tensor:
    """Return the vectors [n, d] in float32, each of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=1, eps=_MIN_NORM)


@torch.no_grad()
def embed_in_batches(
    images: Sequence[Image.Image], processor: Any, embed: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Return unit vectors of images, float32 [n, d] on the CPU.

    Args:
        images: Images of any size.
        processor: Turns them into pixels.
        embed: Turns pixels into vectors.
        device: The device of the model.
    """
    parts = []
    for first in range(0, len(images), IMAGE_BATCH):
        batch = [image.convert("RGB") for image in images[first : first + IMAGE_BATCH]]
        parts.append(embed(processor(batch, return_tensors="pt").pixel_values.to(device)).float().cpu())
    return normalize(torch.cat(parts))


def image_size_problems(processor: Any, size: int) -> list[str]:
    """Return what is wrong if the images of a processor are not squares of ``size`` pixels, as its model reads them."""
    shape = processor(Image.new("RGB", (size + 16, size + 8)), return_tensors="pt").pixel_values.shape[-2:]
    return [] if tuple(shape) == (size, size) else [f"its processor makes {shape[1]}x{shape[0]}, it reads {size}"]


def _freeze(model: Any, device: str | None) -> Any:
    """Return ``model`` frozen, in float32, on its device."""
    return model.to(device or best_device(), torch.float32).requires_grad_(False).eval()
