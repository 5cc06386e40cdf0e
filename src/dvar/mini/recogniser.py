"""The bundled recogniser, a judge of images that never conditions anything."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

RECOGNISED = ("class", "main colour", "pattern", "place")
"""Facts of `dvar.mini.world.captions` that are recognised, their answers numbered as there."""
ASTRAY = 0.1
"""Share of parameters that an image is assumed to get wrong: uniform in [0, 1]."""
LEAST_SPREAD = 0.01
"""The least standard deviation of an estimate: a parameter in [0, 1], seen on 64 pixels."""


@dataclass(frozen=True)
class Recognition:
    """The subjects and places that are recognised in n images.

    Attributes:
        logits: [n, answers] for each head.
        means: The estimate of each parameter if the subject were of each class, [n, classes, 16]: a class gives its
            six shape parameters their meaning.
        spreads: The standard deviations of these estimates, [n, classes, 16].
    """

    logits: dict[str, Tensor]
    means: Tensor
    spreads: Tensor

    def best(self, head: str) -> Tensor:
        """Return the most likely answers, int64 [n]."""
        return self.logits[head].argmax(dim=1)

    def surprise(self, vectors: Tensor, answer: int) -> Tensor:
        """Return -log of the density of each image's subject at each vector, [n, m].

        The parameters are independent, each a Gaussian mixed with a tenth of a uniform density. Without that tenth a
        single wrong colour outweighs everything that is right, and a model does get colours wrong.

        Args:
            vectors: Parameters of subjects, [m, 16].
            answer: The number of their class.
        """
        mean, spread = self.means[:, answer, None], self.spreads[:, answer, None]
        density = (-(((vectors - mean) / spread) ** 2) / 2).exp() / (spread * math.sqrt(2 * math.pi))
        return -(ASTRAY + (1 - ASTRAY) * density).log().sum(dim=-1)

    def identity(self, own: Tensor, others: Tensor, answer: int) -> Tensor:
        """Return the probability that an image shows a subject rather than a distractor, [n]; 1/2 is chance.

        Args:
            own: Parameters of the subject, [16].
            others: Parameters of the distractors, [m, 16]; the result is the mean over them.
            answer: The number of their class.
        """
        return (self.surprise(others, answer) - self.surprise(own[None], answer)).sigmoid().mean(dim=1)


class Recogniser(nn.Module):
    """A convolutional network of four stages, on float images [n, 3, 64, 64] in [-1, 1].

    Args:
        answers: Number of answers of each of `RECOGNISED`.
        parameters: Length of `Subject.vector`.
    """

    def __init__(self, answers: dict[str, int], parameters: int, width: int = 32, hidden: int = 384) -> None:
        super().__init__()
        self.shape = answers["class"], 2, parameters
        widths = [width, 2 * width, 4 * width, 6 * width]
        self.stages = nn.ModuleList(ResidualStage(*pair) for pair in zip([3, *widths], widths, strict=False))
        self.mixed = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, hidden), nn.LayerNorm(hidden), nn.SiLU())
        self.heads = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(hidden, answers[name]) for name in RECOGNISED})
        self.parameter_head = nn.Linear(hidden, math.prod(self.shape))

    def forward(self, images: Tensor) -> Recognition:
        """Return what is recognised in images [n, 3, 64, 64]."""
        for stage in self.stages:
            images = stage(images)
        hidden = self.mixed(images)
        logits = {name: self.heads[name.replace(" ", "_")](hidden) for name in RECOGNISED}
        means, logarithms = self.parameter_head(hidden).float().unflatten(1, self.shape).unbind(dim=2)
        return Recognition(logits, 0.5 + means, (logarithms - 1).clamp(min=math.log(LEAST_SPREAD)).exp())


class ResidualStage(nn.Module):
    """A strided convolution to half the side and ``out`` channels, and a residual convolution."""

    def __init__(self, before: int, out: int) -> None:
        super().__init__()
        self.halve = nn.Sequential(nn.Conv2d(before, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU())
        self.more = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, out, side / 2, side / 2] for [n, before, side, side]."""
        halved: Tensor = self.halve(x)
        residual: Tensor = self.more(halved)
        return halved + residual


def load(path: Path) -> Recogniser:
    """Return the recogniser in a file of weights, frozen, in evaluation mode, in float32."""
    tensors = load_file(path)
    answers = {name: len(tensors[f"heads.{name.replace(' ', '_')}.bias"]) for name in RECOGNISED}
    model = Recogniser(answers, parameters=len(tensors["parameter_head.bias"]) // (2 * answers["class"]))
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    return model.eval().requires_grad_(False)
