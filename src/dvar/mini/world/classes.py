"""The classes of the bundled world: each a noun, a function that draws a subject, and words for its parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dvar.mini.world.canvas import Look, Pen

Draw = Callable[[Pen, Look], None]
CLASSES: dict[str, Draw] = {}
"""Every class by its noun, in the order of the modules that draw them."""


@dataclass(frozen=True)
class Proportion:
    """The words for a small and for a large value of a shape parameter: of a ``part``, or of the whole if empty."""

    low: str
    high: str
    part: str


@dataclass(frozen=True)
class Words:
    """The words of captions for the part in the accent colour, and for each of the six shape parameters.

    None stands for a parameter that a mirrored image would contradict, such as where the door is.
    """

    accent: str
    shape: tuple[Proportion | None, ...]


WORDS: dict[str, Words] = {}
"""The words of every class, by its noun."""


def thing(noun: str, *, accent: str, shape: str) -> Callable[[Draw], Draw]:
    """Register a drawing function under the noun that captions use.

    Args:
        accent: What captions call the part in the accent colour.
        shape: The words of the shape parameters in order, ``low|high part`` each, separated by commas.
    """

    def register(draw: Draw) -> Draw:
        CLASSES[noun] = draw
        WORDS[noun] = Words(accent, tuple(_proportion(text.strip()) for text in shape.split(",")))
        return draw

    return register


def _proportion(text: str) -> Proportion | None:
    if not text:
        return None
    poles, _, part = text.partition(" ")
    low, high = poles.split("|")
    return Proportion(low, high, part)
