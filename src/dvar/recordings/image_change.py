"""How much the images of fixed seeds change along a run, from a few random projections of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

SIDE = 16
"""Side to which images are shrunk before they are projected."""
PROJECTIONS = 64
"""Numbers that are recorded of all images of a step; squared distances are right to sqrt(2 / 64), or 18 %."""
_SEED = 17


def project_images(images: Sequence[Image.Image]) -> list[float]:
    """Return random projections of images, seen as one vector of pixels from 0 to 1.

    The squared distance between the projections of two steps estimates the mean squared change of a pixel.

    Args:
        images: The images of one step, in the same order at every step.

    Source: the lemma of Johnson and Lindenstrauss.
    """
    shrunk = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX) for image in images]
    pixels = np.stack([np.asarray(image, np.float64) for image in shrunk]).ravel() / 255
    projections = _directions(len(pixels)) @ pixels / np.sqrt(PROJECTIONS * len(pixels))
    return [float(projection) for projection in projections]


def moving_variance(projections: ArrayLike, window: int) -> NDArray[np.float64]:
    """Return the variance of the images over each ``window`` records in a row, [n - window + 1].

    Args:
        projections: As the series ``images`` of a recorded run, [n, projections].
        window: Records, at least 2.

    Source: the windowed moving variance by which early stopping of deep image priors is decided (ES-WMV).
    """
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(projections, np.float64), window, axis=0)
    variances: NDArray[np.float64] = windows.var(axis=-1).sum(axis=1)
    return variances


@cache
def _directions(length: int) -> NDArray[np.float64]:
    return np.random.default_rng(_SEED).standard_normal((PROJECTIONS, length))
