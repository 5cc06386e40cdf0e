"""Styles of the bundled world: what is done to a finished image, uint8 [size, size, 3]."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Style = Callable[[np.ndarray], np.ndarray]
STYLES: dict[str, Style] = {"photo": lambda image: image}
"""Every style by the name that captions use; "photo" is the image as it was rendered."""

_GREY = np.array([0.299, 0.587, 0.114], np.float32)
_PAPER = np.array([250, 247, 239], np.float32)
_PENCIL = np.array([52, 52, 60], np.float32)


def style(name: str) -> Callable[[Style], Style]:
    """Register a function under the name that captions use."""

    def register(change: Style) -> Style:
        STYLES[name] = change
        return change

    return register


@style("black and white")
def black_and_white(image: np.ndarray) -> np.ndarray:
    """Return the luminance with a little more contrast."""
    grey = (image @ _GREY - 128) * 1.12 + 128
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


@style("sketch")
def sketch(image: np.ndarray) -> np.ndarray:
    """Return pencil lines where neighbouring pixels differ and light grey where the image is dark, on white paper."""
    colour = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    across = np.abs(colour[1:-1, 2:] - colour[1:-1, :-2]).max(axis=-1)
    down = np.abs(colour[2:, 1:-1] - colour[:-2, 1:-1]).max(axis=-1)
    line = np.clip((np.hypot(across, down) - 22) / 110, 0, 1)
    tone = 0.28 * (1 - image @ _GREY / 255)
    ink = np.clip(line + tone, 0, 1)[..., None]
    drawing: np.ndarray = (_PAPER + (_PENCIL - _PAPER) * ink).astype(np.uint8)
    return drawing


@style("pixel art")
def pixel_art(image: np.ndarray) -> np.ndarray:
    """Return sixteen by sixteen big pixels in few, strong colours: lightness and tint are quantised."""
    size = len(image)
    block = max(size // 16, 1)
    starts = np.arange(0, size, block)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float32), starts, axis=0), starts, axis=1)
    counts = np.diff(np.append(starts, size))
    means = sums / (counts[:, None, None] * counts[None, :, None])
    grey = (means @ _GREY)[..., None]
    steps = np.rint(grey / 36) * 36 + np.rint((means - grey) * 1.2 / 28) * 28
    blocks: np.ndarray = np.clip(steps, 0, 255).astype(np.uint8)
    return blocks.repeat(counts, axis=0).repeat(counts, axis=1)


@style("painting")
def painting(image: np.ndarray) -> np.ndarray:
    """Return soft flat strokes in richer colours.

    A Kuwahara filter: each pixel is the mean of the least varied of the four windows that have it in a corner.
    """
    size, reach = len(image), max(len(image) // 21, 1)
    colour = np.pad(image.astype(np.float32), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    means = _window_mean(colour, reach + 1)
    spread = (_window_mean(colour**2, reach + 1) - means**2).sum(axis=-1)
    corners = [np.s_[y : y + size, x : x + size] for y in (0, reach) for x in (0, reach)]
    calmest, best = means[corners[0]].copy(), spread[corners[0]].copy()
    for corner in corners[1:]:
        calmer = spread[corner] < best
        calmest[calmer], best[calmer] = means[corner][calmer], spread[corner][calmer]
    grey = (calmest @ _GREY)[..., None]
    return np.clip(grey + 1.3 * (calmest - grey), 0, 255).astype(np.uint8)


def _window_mean(values: np.ndarray, wide: int) -> np.ndarray:
    """Return the mean over each ``wide`` by ``wide`` window that fits."""
    rows = np.sum([values[i : len(values) - wide + 1 + i] for i in range(wide)], axis=0)
    mean: np.ndarray = np.sum([rows[:, i : rows.shape[1] - wide + 1 + i] for i in range(wide)], axis=0) / wide**2
    return mean
