"""The classes of the picture book: each a name, a short function that draws one subject of it, and words for its
parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dvar.mini.world.canvas import Look, Pen

Draw = Callable[[Pen, Look], None]
CLASSES: dict[str, Draw] = {}
"""Every class by its noun, in the order of the modules that draw them."""


@dataclass(frozen=True)
class Proportion:
    """The words for a small and for a great value of a shape parameter: of a ``part``, or of the whole where there is
    none."""

    low: str
    high: str
    part: str


@dataclass(frozen=True)
class Words:
    """What captions call the part in the accent colour, and each of the six shape parameters.  None for one that
    a mirrored picture would belie, such as where the door is."""

    accent: str
    shape: tuple[Proportion | None, ...]


WORDS: dict[str, Words] = {}
"""The words of every class, by its noun."""


def thing(noun: str, *, accent: str, shape: str) -> Callable[[Draw], Draw]:
    """Enter a drawing function under the noun that captions use.  ``shape`` names the shape parameters in order,
    ``low|high part`` each, with commas between."""

    def enter(draw: Draw) -> Draw:
        CLASSES[noun] = draw
        WORDS[noun] = Words(accent, tuple(_proportion(text.strip()) for text in shape.split(",")))
        return draw

    return enter


def _proportion(text: str) -> Proportion | None:
    if not text:
        return None
    poles, _, part = text.partition(" ")
    low, high = poles.split("|")
    return Proportion(low, high, part)
