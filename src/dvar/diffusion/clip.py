"""A CLIP, which tells how well words and pictures go together: to find a first word by, and to score by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

TEXTS, PICTURES = 256, 64
"""How many are read at once."""
_LEAST = 1e-12


@dataclass(frozen=True)
class Clip:
    """A CLIP with what it reads words and pictures by, each its own way; frozen, in float32."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @classmethod
    def load(cls, name: str | Path, *, tokenizer: str | Path | None = None, device: str | None = None) -> Clip:
        """Return the CLIP in a folder of transformers or behind a hub id; ``tokenizer`` is where its own is elsewhere.

        Weights are read from safetensors alone.
        Raises: ModelError when it cannot be loaded, or its parts do not fit one another.
        """
        with loading(name, "CLIP"):
            if (kind := transformers.AutoConfig.from_pretrained(name).model_type) != "clip":
                raise ModelError(f"the CLIP must be of type clip, {name} is of type {kind}: name another")
            processor = transformers.CLIPImageProcessorPil.from_pretrained(name)
            words = transformers.CLIPTokenizer.from_pretrained(tokenizer or name)
            model = transformers.CLIPModel.from_pretrained(name, use_safetensors=True)
        clip = cls(Path(name).name, _ready(model, device), words, processor)
        if problems := clip._misfits():
            raise ModelError(f"{name} does not fit: {'; '.join(problems)}: complete the folder or name another CLIP")
        return clip

    @classmethod
    def scoring(cls) -> Clip:
        """Return the CLIP that ships for scoring; it conditions nothing.

        Raises: RefusedInput when the bundled model is not installed.
        """
        clip = cls.load(mini.judges() / "clip", tokenizer=mini.path() / "tokenizer")
        return cls("the bundled scorer", clip.model, clip.tokenizer, clip.processor)

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
        return cls("the bundled conditioner", _ready(model, str(backbone.device)), backbone.tokenizer, processor)

    @property
    def length(self) -> int:
        """Tokens of a text that it reads, the start and the end among them."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> Tensor:
        """Return unit vectors of ``texts``, float32 [n, d] on the CPU; a text beyond `length` is cut."""
        found = []
        for first in range(0, len(texts), TEXTS):
            read = self.tokenizer(
                list(texts[first : first + TEXTS]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            )
            found.append(self.model.get_text_features(**read.to(self.model.device)).pooler_output.float().cpu())
        return unit(torch.cat(found))

    def of_pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return unit vectors of pictures of any size, float32 [n, d] on the CPU."""

        def embed(pixels: Tensor) -> Tensor:
            return self.model.get_image_features(pixel_values=pixels).pooler_output

        return embedded(pictures, self.processor, embed, self.model.device)

    def _misfits(self) -> list[str]:
        words, rows = len(self.tokenizer), self.model.config.text_config.vocab_size
        problems = sizes_differ(self.processor, self.model.config.vision_config.image_size)
        # Without files transformers makes up an empty vocabulary; a real one spells at least the 256 bytes.
        if not 256 <= words <= rows:
            problems.append(f"its tokenizer has {words} words, its text model reads {rows}")
        return problems


def unit(vectors: Tensor) -> Tensor:
    """Return the vectors [n, d] in float32, each of length 1."""
    return torch.nn.functional.normalize(vectors.float(), dim=1, eps=_LEAST)


@torch.no_grad()
def embedded(
    pictures: Sequence[Image.Image], processor: Any, embed: Callable[[Tensor], Tensor], device: torch.device
) -> Tensor:
    """Return unit vectors of pictures, float32 [n, d] on the CPU: ``embed`` of the pixels that a processor makes."""
    parts = []
    for first in range(0, len(pictures), PICTURES):
        shown = [picture.convert("RGB") for picture in pictures[first : first + PICTURES]]
        parts.append(embed(processor(shown, return_tensors="pt").pixel_values.to(device)).float().cpu())
    return unit(torch.cat(parts))


def sizes_differ(processor: Any, wanted: int) -> list[str]:
    """What is wrong with the side of the pictures that a processor makes for a model that reads ``wanted`` pixels."""
    made = processor(Image.new("RGB", (wanted + 16, wanted + 8)), return_tensors="pt").pixel_values.shape[-2:]
    return [] if tuple(made) == (wanted, wanted) else [f"its processor makes {made[1]}x{made[0]}, it reads {wanted}"]


@contextmanager
def loading(name: str | Path, kind: str) -> Iterator[None]:
    """Be quiet while a model of a ``kind`` loads; say in one line why it does not."""
    try:
        with quiet():
            yield
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError, SafetensorError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name} does not load as a {kind}: {said}") from error


def _ready(model: Any, device: str | None) -> Any:
    return model.to(device or best_device(), torch.float32).requires_grad_(False).eval()
