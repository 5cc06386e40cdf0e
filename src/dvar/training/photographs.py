"""Whether an image is a photograph, which the bundled models cannot learn."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageOps

_SIDE = 64  # of the bundled models' images
# The share of neighbouring pixels of one colour, at 64 x 64 pixels. Renderings of their world with 512 pixels have 0.22
# and more. Of 26 photographs of five subjects 23 have 0.15 and less; the others, before a plain ground, up to 0.36.
_FLAT = 0.18


def is_photograph(image: Image.Image) -> bool:
    """Return whether an RGB image is larger than a bundled model's, and has too few plain areas for a drawing.

    Photographs cut out on a plain ground can be missed. Images of 64 pixels are none: a bundled model generates such,
    and what its autoencoder decodes is nowhere quite plain.
    """
    if min(image.size) <= _SIDE:
        return False
    pixels = np.asarray(ImageOps.fit(image, (_SIDE, _SIDE), Image.Resampling.BICUBIC))
    across, down = (pixels[:, 1:] == pixels[:, :-1]), (pixels[1:] == pixels[:-1])
    return bool((across.all(-1).mean() + down.all(-1).mean()) / 2 < _FLAT)
