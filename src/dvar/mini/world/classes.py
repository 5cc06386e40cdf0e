"""The classes of the picture book: each a name and a short function that draws one subject of it."""

from __future__ import annotations

from collections.abc import Callable

from dvar.mini.world.canvas import Look, Pen

Draw = Callable[[Pen, Look], None]
CLASSES: dict[str, Draw] = {}
"""Every class by its noun, in the order of the modules that draw them."""


def thing(noun: str) -> Callable[[Draw], Draw]:
    """Enter a drawing function under the noun that captions use."""

    def enter(draw: Draw) -> Draw:
        CLASSES[noun] = draw
        return draw

    return enter
