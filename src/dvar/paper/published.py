"""Numbers that the paper prints, for comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# Source: arXiv 2302.04841, Tables 1, 2 and 3.


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1 as printed: mean ± standard deviation over 48 concepts; a dash where it is illegible."""

    strategy: str
    train_image: str
    validation_image: str
    validation_text: str
    iterations: str
    minutes: str


TABLE_1: Mapping[str, tuple[PaperRow, ...]] = MappingProxyType(
    {
        "textual-inversion": (
            PaperRow("Baseline", "0.840 ± 0.051", "0.786 ± 0.075", "0.209 ± 0.021", "6100", "27.0 ± 0.3"),
            PaperRow("CLIP-s", "0.824 ± 0.053", "0.757 ± 0.067", "0.233 ± 0.024", "666.7 ± 174.5", "9.6 ± 2.5"),
            PaperRow("Few iters (mean)", "0.801 ± 0.071", "0.732 ± 0.090", "0.243 ± 0.027", "475", "1.6 ± 0.0"),
            PaperRow("Few iters (max)", "0.809 ± 0.070", "0.754 ± 0.080", "0.228 ± 0.027", "850", "2.8 ± 0.0"),
            PaperRow("DVAR", "0.795 ± 0.067", "0.748 ± 0.068", "0.227 ± 0.024", "566.0 ± 141.5", "3.1 ± 0.8"),
        ),
        "dreambooth-lora": (
            PaperRow("Baseline", "0.865 ± 0.045", "0.833 ± 0.067", "0.203 ± 0.019", "1000", "7.8 ± 1.5"),
            PaperRow("CLIP-s", "0.862 ± 0.045", "0.788 ± 0.075", "0.225 ± 0.022", "353.2 ± 88.1", "6.1 ± 1.5"),
            PaperRow("Few iters (mean)", "0.854 ± 0.063", "0.783 ± 0.110", "0.225 ± 0.029", "367", "2.0 ± 0.1"),
            PaperRow("Few iters (max)", "–", "0.793 ± 0.115", "0.218 ± 0.022", "500", "2.6 ± 0.1"),
            PaperRow("DVAR", "0.784 ± 0.106", "0.687 ± 0.140", "0.238 ± 0.034", "665.3 ± 94.9", "4.9 ± 0.7"),
        ),
        "custom-diffusion": (
            PaperRow("Baseline", "0.755 ± 0.077", "0.695 ± 0.069", "0.258 ± 0.021", "500.4 ± 0.5", "6.5 ± 0.9"),
            PaperRow("CLIP-s", "0.757 ± 0.076", "0.691 ± 0.069", "0.258 ± 0.023", "510.4 ± 134.1", "9.7 ± 3.0"),
            PaperRow("Few iters (mean)", "–", "0.691 ± 0.070", "0.259 ± 0.023", "450.0 ± 0.0", "3.4 ± 0.9"),
            PaperRow("Few iters (max)", "0.754 ± 0.078", "0.691 ± 0.073", "0.257 ± 0.022", "700.0 ± 0.0", "5.3 ± 1.4"),
            PaperRow("DVAR", "0.742 ± 0.074", "0.693 ± 0.066", "0.259 ± 0.022", "348.1 ± 46.6", "3.4 ± 1.0"),
        ),
    }
)

CONCEPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Textual Inversion": (
            *("cat_statue", "clock", "colorful_teapot", "elephant", "mug_skulls", "physics_mug", "red_teapot"),
            *("round_bird", "thin_bird"),
        ),
        "Custom Diffusion": (
            *("barn", "cat", "chair", "dog", "flower", "table", "teddybear", "tortoise_plushy", "wooden_pot"),
        ),
        "DreamBooth": (
            *("backpack", "backpack_dog", "bear_plushie", "berry_bowl", "can", "candle", "cat1", "cat2", "clock1"),
            *("colorful_sneaker", "dog1", "dog2", "dog3", "dog5", "dog6", "dog7", "dog8", "duck_toy", "fancy_boot"),
            *("grey_sloth_plushie", "monster_toy", "pink_sunglasses", "poop_emoji", "rc_car", "red_cartoon"),
            *("robot_toy", "shiny_sneaker", "teapot", "vase", "wolf_plushie"),
        ),
    }
)
"""The paper's 48 concepts by who published them, named as its released code names them: in DreamBooth's set ``cat``,
``clock`` and ``dog`` became ``cat1``, ``clock1`` and ``dog1``.  Source: Section 4.1 and the released code."""

TABLE_2: Mapping[tuple[str, Literal["reconstruction", "customization"]], float] = MappingProxyType(
    {
        ("textual-inversion", "reconstruction"): 0.416,
        ("textual-inversion", "customization"): 0.777,
        ("dreambooth-lora", "reconstruction"): 0.679,
        ("dreambooth-lora", "customization"): 0.914,
        ("custom-diffusion", "reconstruction"): 0.699,
        ("custom-diffusion", "customization"): 0.938,
    }
)
"""The share of votes in which DVAR was better or equal; the paper does not report how much of it was equal."""

TABLE_3: Mapping[tuple[str, str], tuple[float, float, float, float]] = MappingProxyType(
    {
        ("train", "clip_text"): (0.27, 0.33, 0.30, 0.36),
        ("validation", "clip_text"): (0.48, 0.51, 0.37, 0.50),
        ("train", "clip_image"): (-0.63, -0.64, -0.56, -0.62),
        ("validation", "clip_image"): (-0.58, -0.60, -0.53, -0.56),
    }
)
"""Pearson correlation with L_det on timesteps of the beginning, the middle, the end, and all; 9 concepts pooled."""
