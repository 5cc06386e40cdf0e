"""A CLIP, which tells how well words and pictures go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvar import mini
from dvar.diffusion.backbone import Backbone, best_device, quiet
from dvar.errors import ModelError

BATCH = 256


@dataclass(frozen=True)
class Clip:
    """A CLIP with what it reads words and pictures by; frozen, in float32."""

    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path, *, device: str | None = None) -> Clip:
        """Return the CLIP in a folder of transformers or behind a hub id; weights are read from safetensors alone.

        Raises: ModelError when it cannot be loaded.
        """
        try:
            with quiet():
                return cls(
                    _ready(transformers.CLIPModel.from_pretrained(name, use_safetensors=True), device),
                    transformers.CLIPTokenizer.from_pretrained(name),
                    transformers.CLIPImageProcessorPil.from_pretrained(name),
                )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{name} does not load as a CLIP: {said}") from error

    @classmethod
    def bundled(cls, backbone: Backbone) -> Clip:
        """Return the CLIP whose text encoder conditions the bundled model, ``backbone``, untouched as it was loaded."""
        folder = mini.path().parent / "judges" / "clip-conditioner"
        with quiet():
            model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(folder))
        words = {f"text_model.{name}": part.cpu() for name, part in backbone.text_encoder.state_dict().items()}
        rest = {name: part.float() for name, part in load_file(folder / "all-but-text.safetensors").items()}
        model.load_state_dict({**rest, **words})
        size, middle = model.config.vision_config.image_size, [0.5] * 3
        processor = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size=size, image_mean=middle, image_std=middle
        )
        return cls(_ready(model, str(backbone.device)), backbone.tokenizer, processor)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors of ``texts``, float32 [n, d] on the CPU; what is too long is cut."""
        length, found = self.model.config.text_config.max_position_embeddings, []
        for first in range(0, len(texts), BATCH):
            read = self.tokenizer(
                list(texts[first : first + BATCH]),
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            found.append(self.model.get_text_features(**read.to(self.model.device)).pooler_output.cpu())
        return torch.nn.functional.normalize(torch.cat(found), dim=1)

    @torch.no_grad()
    def of_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors of RGB pictures, float32 [n, d] on the CPU."""
        pixels = self.processor(list(pictures), return_tensors="pt").pixel_values.to(self.model.device)
        found = torch.cat([self.model.get_image_features(part).pooler_output for part in pixels.split(BATCH)])
        return torch.nn.functional.normalize(found.cpu(), dim=1)


def _ready(model: Any, device: str | None) -> Any:
    return model.to(device or best_device(), torch.float32).requires_grad_(False).eval()
