"""What is asked of the model's images beyond class, colour, pattern and place: the accent's colour, proportions, and
how near their distribution is to that of rendered images."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
from torch import Tensor

from dvar.mini import recogniser
from dvar.mini.world.captions import with_article
from dvar.mini.world.classes import CLASSES, WORDS
from dvar.mini.world.scene import COLOURS, SHAPES
from pretraining.pictures import as_tensor

ACCENT = slice(6, 9)
"""Of `Subject.vector`: the RGB of the accent."""
FIRST_SHAPE = 10
BANDWIDTH, SCALE = 10.0, 1000.0
"""Of the kernel of CMMD, and what its authors multiply it by (Jayasumana et al. 2024)."""


def nearest_colours(rgb: Tensor) -> Tensor:
    """Return the number of the named colour whose middle is nearest to each row of ``rgb`` [n, 3] in [0, 1]."""
    middles = torch.tensor([colorsys.hsv_to_rgb(*middle) for middle, _ in COLOURS.values()])
    return torch.cdist(rgb.float(), middles).argmin(1)


def estimates(judge: recogniser.Recogniser, pixels: np.ndarray, nouns: Tensor) -> Tensor:
    """Return the parameters that the recogniser sees in each image if its class is the given one, [n, 16]."""
    with torch.no_grad():
        return judge(as_tensor(pixels)).means[torch.arange(len(pixels)), nouns]


def accent_prompts(n: int, seed: int) -> tuple[list[str], Tensor, Tensor]:
    """Return n prompts such as "a photo of a white house with a turquoise roof", and the numbers of their classes and
    of their accents' colours."""
    rng = np.random.default_rng(seed)
    texts, nouns, accents = [], [], []
    for i in range(n):
        noun = list(CLASSES)[i % len(CLASSES)]
        main, accent = (int(colour) for colour in rng.choice(len(COLOURS), 2, replace=False))
        part = with_article(f"{list(COLOURS)[accent]} {WORDS[noun].accent}")
        texts.append(f"a photo of {with_article(f'{list(COLOURS)[main]} {noun}')} with {part}")
        nouns.append(i % len(CLASSES))
        accents.append(accent)
    return texts, torch.tensor(nouns), torch.tensor(accents)


def proportion_prompts(n: int, seed: int) -> tuple[list[str], list[str], Tensor, Tensor]:
    """Return n pairs of prompts that differ in one proportion, such as "a cat with short ears" and "a cat with long
    ears", with the numbers of their classes and of their proportions."""
    rng = np.random.default_rng(seed)
    low, high, nouns, numbers = [], [], [], []
    while len(low) < n:
        noun, number = list(CLASSES)[len(low) % len(CLASSES)], int(rng.integers(SHAPES))
        proportion = WORDS[noun].shape[number]
        if proportion is None:
            continue
        for texts, word in ((low, proportion.low), (high, proportion.high)):
            if proportion.part:
                texts.append(f"a photo of {with_article(noun)} with {with_article(f'{word} {proportion.part}')}")
            else:
                texts.append(f"a photo of {with_article(f'{word} {noun}')}")
        nouns.append(list(CLASSES).index(noun))
        numbers.append(number)
    return low, high, torch.tensor(nouns), torch.tensor(numbers)


def rise(low: Tensor, high: Tensor, numbers: Tensor) -> dict[str, float]:
    """Return in what percentage of pairs the asked parameter is estimated higher where it was asked to be, and by how
    much on average; ``low`` and ``high`` [n, 16], ``numbers`` [n]."""
    rows = torch.arange(len(numbers))
    difference = high[rows, FIRST_SHAPE + numbers] - low[rows, FIRST_SHAPE + numbers]
    return {
        "proportion moves as asked, % (chance 50)": 100 * float((difference > 0).float().mean()),
        "by how much, % of its range": 100 * float(difference.mean()),
    }


def cmmd(a: Tensor, b: Tensor) -> float:
    """Return the squared maximum mean discrepancy between two sets of unit vectors [n, d], times 1,000.

    Source: Jayasumana et al., Rethinking FID (2024), Equations 3 and 4; a Gaussian kernel, the biased estimate.
    Deviates: the embeddings are the bundled CLIP's, so the number is comparable with no other model's.
    """

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x.double(), y.double()).square() / (2 * BANDWIDTH**2)).mean()

    return SCALE * float(mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b))
