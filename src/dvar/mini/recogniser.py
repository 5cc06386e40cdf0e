"""A judge that never conditions anything: reads class, place, colour, pattern and the subject's parameters off a
picture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

RECOGNISED = ("class", "main colour", "pattern", "place")
"""Facts of `dvar.mini.world.captions` that are recognised, their answers numbered as there."""
ASTRAY = 0.1
"""Share of parameters that a picture is taken to get wrong: anything in [0, 1], all alike."""
LEAST_SPREAD = 0.01
"""No estimate is surer than this: a parameter in [0, 1] seen on 64 pixels."""


@dataclass(frozen=True)
class Recognition:
    """What is seen in n pictures.

    ``logits``: [n, answers] for each head.  ``means`` and ``spreads``: [n, classes, 16], the estimate of each parameter
    and its standard deviation if the subject were of each class: a class gives its six shape parameters their meaning.
    """

    logits: dict[str, Tensor]
    means: Tensor
    spreads: Tensor

    def best(self, head: str) -> Tensor:
        """int64 [n]: the most likely answer."""
        return self.logits[head].argmax(dim=1)

    def surprise(self, vectors: Tensor, answer: int) -> Tensor:
        """[n, m]: -log of the density of each picture's subject, one of class number ``answer``, at each of ``vectors``
        [m, 16], every parameter by itself: Gaussian, but for one in ten, which says nothing.

        Without that tenth a single wrong colour outweighs all that is right, and what a model draws has wrong ones.
        """
        mean, spread = self.means[:, answer, None], self.spreads[:, answer, None]
        density = (-(((vectors - mean) / spread) ** 2) / 2).exp() / (spread * math.sqrt(2 * math.pi))
        return -(ASTRAY + (1 - ASTRAY) * density).log().sum(dim=-1)

    def identity(self, own: Tensor, others: Tensor, answer: int) -> Tensor:
        """[n] in [0, 1]: the probability that a picture shows the subject with parameters ``own`` [16] rather than a
        distractor, mean over the distractors ``others`` [m, 16], all of class number ``answer``; 1/2 is chance."""
        return (self.surprise(others, answer) - self.surprise(own[None], answer)).sigmoid().mean(dim=1)


class Recogniser(nn.Module):
    """Four convolutional stages on float pictures [n, 3, 64, 64] in [-1, 1].

    ``answers``: how many each of `RECOGNISED` has; ``parameters``: the length of `Subject.vector`.
    """

    def __init__(self, answers: dict[str, int], parameters: int, width: int = 32, hidden: int = 384) -> None:
        super().__init__()
        self.shape = answers["class"], 2, parameters
        widths = [width, 2 * width, 4 * width, 6 * width]
        self.stages = nn.ModuleList(ResidualStage(*pair) for pair in zip([3, *widths], widths, strict=False))
        self.mixed = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * 16, hidden), nn.LayerNorm(hidden), nn.SiLU())
        self.heads = nn.ModuleDict({name.replace(" ", "_"): nn.Linear(hidden, answers[name]) for name in RECOGNISED})
        self.parameter_head = nn.Linear(hidden, math.prod(self.shape))

    def forward(self, pictures: Tensor) -> Recognition:
        for stage in self.stages:
            pictures = stage(pictures)
        hidden = self.mixed(pictures)
        logits = {name: self.heads[name.replace(" ", "_")](hidden) for name in RECOGNISED}
        means, logarithms = self.parameter_head(hidden).float().unflatten(1, self.shape).unbind(dim=2)
        return Recognition(logits, 0.5 + means, (logarithms - 1).clamp(min=math.log(LEAST_SPREAD)).exp())


class ResidualStage(nn.Module):
    """Half the side, ``out`` channels, and a residual convolution."""

    def __init__(self, before: int, out: int) -> None:
        super().__init__()
        self.halve = nn.Sequential(nn.Conv2d(before, out, 4, 2, 1), nn.GroupNorm(8, out), nn.SiLU())
        self.more = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(8, out), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.halve(x)
        return x + self.more(x)


def load(path: Path) -> Recogniser:
    """The shipped recogniser, frozen, in eval mode, in float32."""
    tensors = load_file(path)
    answers = {name: len(tensors[f"heads.{name.replace(' ', '_')}.bias"]) for name in RECOGNISED}
    model = Recogniser(answers, parameters=len(tensors["parameter_head.bias"]) // (2 * answers["class"]))
    model.load_state_dict({key: value.float() for key, value in tensors.items()})
    return model.eval().requires_grad_(False)
