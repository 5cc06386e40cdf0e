"""Sizes of training images by their aspect ratio."""

from __future__ import annotations

import math
import re

AUTO = "auto"
LARGEST = 8192
"""The largest side of a named size, as of the square."""
WIDEST = 2.0
"""The largest ratio of the sides of a bucket that is found automatically."""
Size = tuple[int, int]
"""(height, width) in pixels."""


def list_buckets(text: str, resolution: int) -> tuple[Size, ...]:
    """Return the sizes that ``text`` names: "H,W;H,W", as in diffusers' scripts, or "auto".

    Automatic ones have about as many pixels as a square of ``resolution``, never more, and sides that are multiples of
    64, or of 16 below 512.

    Raises:
        ValueError: It names no sizes, or one that no model has.
    """
    if text != AUTO:
        if not re.fullmatch(r"\s*\d+\s*,\s*\d+\s*(;\s*\d+\s*,\s*\d+\s*)*", text):
            raise ValueError(f"aspect_ratio_buckets must be {AUTO}, or sizes such as 512,768;768,512, got {text!r}")
        pairs = (pair.split(",") for pair in text.split(";"))
        sizes = [(int(height), int(width)) for height, width in pairs]
        for height, width in sizes:
            if height % 8 or width % 8 or not 8 <= min(height, width) <= max(height, width) <= LARGEST:
                message = f"aspect_ratio_buckets must have sides that are multiples of 8, up to {LARGEST}"
                raise ValueError(f"{message}, got {height},{width}")
        return tuple(dict.fromkeys(sizes))
    step = 64 if resolution >= 512 else 16
    automatic: set[Size] = set()
    for width in range(step, math.floor(resolution * math.sqrt(WIDEST)) + 1, step):
        height = min(resolution * resolution // width // step * step, math.floor(width * WIDEST) // step * step)
        if height and max(width / height, height / width) <= WIDEST and height * width > resolution * resolution // 2:
            automatic |= {(height, width), (width, height)}
    square = resolution // 8 * 8
    return tuple(sorted(automatic | {(square, square)}))


def valid_buckets(text: str | None, resolution: int) -> tuple[Size, ...]:
    """Return the sizes that ``text`` names; none where it names none, which `dvar.config.training.problems` reports."""
    try:
        return list_buckets(text, resolution) if text else ()
    except ValueError:
        return ()


def nearest_bucket(size: Size, buckets: tuple[Size, ...]) -> Size:
    """Return the bucket whose aspect ratio is most like that of an image (height, width); of equals, the largest."""
    ratio = math.log(size[1] / size[0])
    return min(buckets, key=lambda bucket: (round(abs(math.log(bucket[1] / bucket[0]) - ratio), 6), -math.prod(bucket)))
