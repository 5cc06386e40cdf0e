"""LPIPS, a perceptual distance between images, and the diversity of samples by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d

from dvar.errors import ModelError
from dvar.files import regular_file

_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""How the colours of an image in [-1, 1] are normalised."""
_EPSILON = 1e-10


@dataclass(frozen=True)
class _Layer:
    """A convolution of AlexNet: where its weights stand in the file, and how it is applied."""

    name: str
    stride: int
    padding: int
    pooled: bool


_LAYERS = (
    _Layer("net.slice1.0", 4, 2, pooled=False),
    _Layer("net.slice2.3", 1, 2, pooled=True),
    _Layer("net.slice3.6", 1, 1, pooled=True),
    _Layer("net.slice4.8", 1, 1, pooled=False),
    _Layer("net.slice5.10", 1, 1, pooled=False),
)


@dataclass(frozen=True)
class Lpips:
    """LPIPS by AlexNet: distances between normalised features, weighted as people judge.

    Args:
        name: Name of the file.
        weights: The tensors of the lpips package's model by their names.

    Source: Zhang et al., CVPR 2018, version 0.1 of the weights; DreamBooth reports it between samples as diversity.
    """

    name: str
    weights: Mapping[str, Tensor]

    @classmethod
    def load(cls, path: str | Path) -> Lpips:
        """Return the model in a safetensors file, which docs/paper-concepts.md says how to make.

        Raises:
            ModelError: The file cannot be read, or lacks a tensor.
        """
        path = Path(path).expanduser()
        try:
            weights = {name: weight.float() for name, weight in load_file(regular_file(path)).items()}
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} does not load as a safetensors file ({error}): name another LPIPS") from error
        for number in range(len(_LAYERS)):  # the package has each of these under two names, of which one is saved
            listed = f"lins.{number}.model.1.weight"
            if listed in weights:
                weights[f"lin{number}.model.1.weight"] = weights.pop(listed)
        needed = [f"{layer.name}.{part}" for layer in _LAYERS for part in ("weight", "bias")]
        needed += [f"lin{number}.model.1.weight" for number in range(len(_LAYERS))]
        if missing := [name for name in needed if name not in weights]:
            raise ModelError(f"{path} is no LPIPS by AlexNet, it lacks {', '.join(missing)}: name another file")
        return cls(path.name, {name: weights[name] for name in needed})

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return the features of RGB images of one size after each layer, each [n, channels, h, w] of unit length."""
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        colours = (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1 - _column(_SHIFT)) / _column(_SCALE)
        features, layers = colours, []
        for layer in _LAYERS:
            if layer.pooled:
                features = max_pool2d(features, kernel_size=3, stride=2)
            weight, bias = (self.weights[f"{layer.name}.{part}"] for part in ("weight", "bias"))
            features = conv2d(features, weight, bias, layer.stride, layer.padding).relu()
            layers.append(features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON))
        return layers

    def distances(self, images: Sequence[Image.Image], others: Sequence[Image.Image]) -> Tensor:
        """Return the distance of each image to the other in its place, float32 [n]; 0 for equal images."""
        total = torch.zeros(len(images))
        for number, (of, to) in enumerate(zip(self.features(images), self.features(others), strict=True)):
            weighted = conv2d((of - to).square(), self.weights[f"lin{number}.model.1.weight"])
            total += weighted.mean(dim=(1, 2, 3))
        return total

    def diversity(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor | None:
        """Return the mean distance of each image to the others of its text, float32 [n].

        Returns:
            None where some text has a single image.
        """
        groups = [[place for place, text in enumerate(texts) if text == name] for name in dict.fromkeys(texts)]
        if min(map(len, groups)) < 2:
            return None
        pairs = [pair for group in groups for pair in combinations(group, 2)]
        distances = self.distances([images[first] for first, _ in pairs], [images[second] for _, second in pairs])
        of_image: list[list[float]] = [[] for _ in images]
        for pair, distance in zip(pairs, distances.tolist(), strict=True):
            for place in pair:
                of_image[place].append(distance)
        return torch.tensor([np.mean(of) for of in of_image], dtype=torch.float32)


def _column(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).reshape(1, 3, 1, 1)
