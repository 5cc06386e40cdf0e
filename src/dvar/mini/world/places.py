"""The places of the bundled world: each a name, its words in captions, and a function that draws it."""

# A place is drawn in the unit square, (0, 0) top left; ``ground`` is the height of the horizon or of a table's back
# edge, and ``rng`` draws what differs between two images of one place (clouds, trees, stones).  What identifies a place
# is at the sides, the top and the bottom of the image, since the subject stands in the middle.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dvar.mini.world.canvas import Colour, Pen, box, curve, darker, lighter, mix, oval, polygon, union

DrawPlace = Callable[[Pen, float, np.random.Generator], None]


@dataclass(frozen=True)
class Place:
    """A place: ``words`` follow the subject in a caption; ``shadow`` is how dark a subject's shadow is there."""

    words: str
    draw: DrawPlace
    shadow: float = 0.35


PLACES: dict[str, Place] = {}


def place(name: str, words: str, shadow: float = 0.35) -> Callable[[DrawPlace], DrawPlace]:
    """Register a drawing function as a place; the arguments are those of `Place`."""

    def register(draw: DrawPlace) -> DrawPlace:
        PLACES[name] = Place(words, draw, shadow)
        return draw

    return register


def _between(rng: np.random.Generator, a: Colour, b: Colour) -> Colour:
    """Return a random mixture of two colours."""
    return mix(a, b, float(rng.uniform()))


def _side(rng: np.random.Generator, margin: float = 0.12) -> float:
    """Return a random x near the left or the right edge."""
    x = float(rng.uniform(margin * 0.7, margin * 1.2))
    return x if rng.uniform() < 0.5 else 1 - x


def _sky(pen: Pen, ground: float, rng: np.random.Generator, clouds: int = 2) -> None:
    """Draw a daytime sky down to the horizon."""
    top = _between(rng, (0.28, 0.60, 0.92), (0.52, 0.76, 0.95))
    pen.gradient(box(0, 0, 1, ground + 0.02), top, lighter(top, 0.65))
    for i in range(clouds):
        x, y, wide = (i + rng.uniform(0.1, 0.9)) / clouds, rng.uniform(0.07, 0.2), rng.uniform(0.10, 0.15)
        left = oval(x - wide * 0.3, y - 0.03, wide * 0.5, 0.05)
        right = oval(x + wide * 0.35, y - 0.02, wide * 0.45, 0.04)
        pen.fill(union(oval(x, y, wide, 0.042), left, right), (1.0, 1.0, 1.0), 0.92)


def _hills(pen: Pen, ground: float, rng: np.random.Generator, rise: float, top: Colour, bottom: Colour) -> None:
    """Draw the ground from a wavy horizon, at most ``rise`` above ``ground``, to the bottom of the image."""
    ridge = [(x, ground - rise * rng.uniform()) for x in (-0.1, 0.18, 0.5, 0.82, 1.1)]
    pen.gradient(curve((-0.2, 1.1), (-0.2, ground), *ridge, (1.2, ground), (1.2, 1.1)), top, bottom)


def _fir(pen: Pen, x: float, foot: float, height: float, colour: Colour) -> None:
    pen.fill(box(x - 0.025, foot - 0.1, x + 0.025, foot), (0.36, 0.24, 0.16))
    for i in range(3):
        y, wide = foot - height * (0.12 + 0.27 * i), height * (0.36 - 0.08 * i)
        pen.fill(polygon((x - wide, y), (x, y - height * 0.42), (x + wide, y)), lighter(colour, 0.07 * i))


def _dome(pen: Pen, x: float, top: float, wide: float, high: float, colour: Colour) -> None:
    """Return a round cap with a flat bottom: a sunshade, a mushroom's cap."""
    foot, shoulder, half = top + high, top + high * 0.28, wide * 0.65
    pen.fill(curve((x - wide, foot), (x - half, shoulder), (x, top), (x + half, shoulder), (x + wide, foot)), colour)


def _star(pen: Pen, x: float, y: float, points: int, outer: float, inner: float, colour: Colour) -> None:
    angles = np.arange(2 * points) * np.pi / points
    radii = [outer, inner] * points
    pen.fill(polygon(*[(x + r * np.sin(a), y - r * np.cos(a)) for a, r in zip(angles, radii, strict=True)]), colour)


@place("beach", "on the beach")
def draw_beach(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    _sky(pen, ground, rng)
    sea = _between(rng, (0.10, 0.62, 0.74), (0.22, 0.70, 0.72))
    pen.gradient(box(0, ground - 0.15, 1, ground + 0.05), darker(sea, 0.15), lighter(sea, 0.25))
    shore = [(x, ground + rng.uniform(-0.015, 0.035)) for x in (-0.1, 0.15, 0.4, 0.65, 0.9, 1.1)]
    sand = curve((-0.2, 1.1), *shore, (1.2, 1.1))
    pen.line(curve(*shore), (0.97, 1.0, 1.0), 0.05)
    pen.gradient(sand, _between(rng, (0.98, 0.89, 0.66), (0.96, 0.84, 0.58)), (0.88, 0.74, 0.48))
    x, top = _side(rng), ground - rng.uniform(0.30, 0.38)
    colour = _between(rng, (0.93, 0.27, 0.22), (0.98, 0.62, 0.16))
    pen.line(curve((x, top), (x, ground + 0.15)), (0.98, 0.96, 0.90), 0.025)
    _dome(pen, x, top, 0.2, 0.15, colour)
    _dome(pen, x, top, 0.07, 0.15, (1.0, 0.97, 0.90))
    _star(pen, 1 - x, rng.uniform(0.86, 0.93), 5, 0.07, 0.03, (0.93, 0.45, 0.34))


@place("grass", "on the grass")
def draw_grass(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    _sky(pen, ground, rng)
    green = _between(rng, (0.36, 0.68, 0.22), (0.52, 0.76, 0.28))
    _hills(pen, ground - 0.03, rng, 0.14, lighter(green, 0.35), lighter(green, 0.2))
    _hills(pen, ground + 0.03, rng, 0.05, lighter(green, 0.08), darker(green, 0.22))
    petals = [(1.0, 1.0, 1.0), (1.0, 0.86, 0.22), (0.98, 0.58, 0.72)][int(rng.integers(3))]
    for x in (0.06, 0.19, 0.81, 0.94):
        x, y = x + rng.uniform(-0.03, 0.03), rng.uniform(ground + 0.12, 0.95)
        for angle in np.arange(5) * 2 * np.pi / 5:
            pen.fill(oval(x + 0.03 * np.sin(angle), y - 0.03 * np.cos(angle), 0.022, 0.022), petals)
        pen.fill(oval(x, y, 0.02, 0.02), (0.95, 0.62, 0.10))


@place("snow", "in the snow", shadow=0.25)
def draw_snow(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    top = _between(rng, (0.50, 0.64, 0.80), (0.64, 0.72, 0.82))
    pen.gradient(box(0, 0, 1, ground + 0.05), top, lighter(top, 0.4))
    _hills(pen, ground - 0.02, rng, 0.12, (0.84, 0.90, 0.97), (0.80, 0.87, 0.95))
    for x in (rng.uniform(0.04, 0.16), rng.uniform(0.84, 0.96)):
        height = rng.uniform(0.34, 0.46)
        _fir(pen, x, ground + 0.04, height, (0.20, 0.42, 0.40))
        tip, wide = ground + 0.04 - height * 1.08, height * 0.1
        pen.fill(polygon((x - wide, tip + height * 0.2), (x, tip), (x + wide, tip + height * 0.2)), (0.98, 0.99, 1.0))
    _hills(pen, ground + 0.05, rng, 0.05, (0.98, 0.99, 1.0), (0.84, 0.90, 0.97))
    for i in range(9):
        x, y = (i + rng.uniform(0.2, 0.8)) / 9, rng.uniform(0.03, ground * 0.75)
        pen.fill(oval(x, y, 0.022, 0.022), (1.0, 1.0, 1.0))


@place("night", "at night", shadow=0.5)
def draw_night(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    top = _between(rng, (0.04, 0.05, 0.18), (0.11, 0.06, 0.24))
    pen.gradient(box(0, 0, 1, ground + 0.02), top, mix(top, (0.24, 0.30, 0.58), 0.7))
    moon, y, radius = _side(rng, 0.17), rng.uniform(0.13, 0.2), rng.uniform(0.085, 0.115)
    pen.fill(oval(moon, y, radius * 1.5, radius * 1.5), (0.98, 0.93, 0.66), 0.16)
    pen.fill(oval(moon, y, radius, radius), (1.0, 0.95, 0.70))
    for i in range(6):
        x, y = (i + rng.uniform(0.2, 0.8)) / 6, rng.uniform(0.05, ground * 0.7)
        if abs(x - moon) > 0.2:
            _star(pen, x, y, 4, 0.042, 0.017, (1.0, 0.97, 0.80))
    _hills(pen, ground, rng, 0.14, (0.12, 0.16, 0.34), (0.12, 0.16, 0.34))
    land = _between(rng, (0.16, 0.26, 0.36), (0.20, 0.22, 0.40))
    _hills(pen, ground + 0.04, rng, 0.04, lighter(land, 0.1), darker(land, 0.35))


@place("desert", "in the desert")
def draw_desert(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    top = _between(rng, (0.97, 0.58, 0.28), (0.96, 0.70, 0.40))
    pen.gradient(box(0, 0, 1, ground + 0.02), top, (1.0, 0.90, 0.66))
    x = _side(rng, 0.2)
    pen.fill(oval(x, rng.uniform(0.13, 0.2), 0.1, 0.1), (1.0, 0.97, 0.78))
    _hills(pen, ground - 0.02, rng, 0.16, (0.80, 0.44, 0.26), (0.86, 0.54, 0.30))
    sand = _between(rng, (0.93, 0.66, 0.36), (0.90, 0.60, 0.34))
    _hills(pen, ground + 0.04, rng, 0.06, lighter(sand, 0.15), darker(sand, 0.18))
    x = 1 - 0.6 * x if x < 0.5 else 0.6 * (1 - x)
    foot, height, green = ground + 0.12, rng.uniform(0.38, 0.48), _between(rng, (0.22, 0.50, 0.30), (0.30, 0.54, 0.24))
    pen.line(curve((x, foot), (x, foot - height)), green, 0.09)
    for side in (-1, 1):
        y = foot - height * rng.uniform(0.35, 0.55)
        arm = polygon((x, y), (x + side * 0.1, y), (x + side * 0.1, y - 0.12), (x + side * 0.1, y))
        pen.line(arm, green, 0.055)
    pen.line(curve((x - 0.015, foot), (x - 0.015, foot - height)), lighter(green, 0.25), 0.022)
    pen.fill(oval(1 - x, rng.uniform(0.9, 0.96), 0.075, 0.045), darker(sand, 0.42))


@place("sea", "by the sea")
def draw_sea(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    horizon = ground - 0.32
    _sky(pen, horizon, rng, clouds=1)
    sea = _between(rng, (0.05, 0.27, 0.58), (0.06, 0.36, 0.62))
    pen.gradient(box(0, horizon, 1, 1), lighter(sea, 0.12), darker(sea, 0.1))
    x, foot, side = _side(rng, 0.17), horizon + 0.02, rng.choice((-1, 1))
    pen.fill(polygon((x, foot - 0.21), (x, foot), (x + side * 0.13, foot)), (1.0, 1.0, 0.98))
    back = x - side * 0.025
    pen.fill(polygon((back, foot - 0.16), (back, foot), (back - side * 0.08, foot)), (0.93, 0.33, 0.26))
    hull = polygon((x - 0.12, foot + 0.01), (x + 0.12, foot + 0.01), (x + 0.07, foot + 0.06), (x - 0.07, foot + 0.06))
    pen.fill(hull, (0.48, 0.25, 0.16))
    for i, y in enumerate((horizon + 0.13, horizon + 0.23)):
        start = rng.uniform(-0.15, 0.0)
        crest = [(start + 0.11 * k, y + 0.022 * (-1) ** (k + i)) for k in range(12)]
        pen.line(curve(*crest), lighter(sea, 0.5), 0.028)
    wood = _between(rng, (0.66, 0.48, 0.32), (0.60, 0.50, 0.42))
    for x in (0.07, 0.93):
        pen.part(box(x - 0.045, ground - 0.13, x + 0.045, ground + 0.1, 0.02), darker(wood, 0.25), outline=0.015)
    pen.gradient(box(0, ground, 1, 1), lighter(wood, 0.2), wood)
    for y in (ground + 0.005, ground + 0.09, ground + 0.2, ground + 0.33):
        pen.fill(box(0, y, 1, y + 0.022), darker(wood, 0.38))


@place("table", "on a table")
def draw_table(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    wall = [(0.93, 0.87, 0.74), (0.76, 0.86, 0.78), (0.90, 0.78, 0.76), (0.78, 0.82, 0.90)][int(rng.integers(4))]
    pen.gradient(box(0, 0, 1, 1), wall, darker(wall, 0.12))
    for i in range(5):
        pen.fill(box(0.04 + 0.2 * i, 0, 0.14 + 0.2 * i, 1), darker(wall, 0.1), 0.6)
    x = _side(rng, 0.17)
    top, bottom = rng.uniform(0.04, 0.08), ground - 0.16
    pen.fill(box(x - 0.19, top, x + 0.19, bottom), (0.99, 0.98, 0.95))
    pen.gradient(box(x - 0.15, top + 0.04, x + 0.15, bottom - 0.04), (0.45, 0.74, 0.95), (0.82, 0.93, 0.98))
    pen.fill(box(x - 0.018, top, x + 0.018, bottom), (0.99, 0.98, 0.95))
    bar = (top + bottom) / 2
    pen.fill(box(x - 0.15, bar - 0.018, x + 0.15, bar + 0.018), (0.99, 0.98, 0.95))
    pen.fill(box(x - 0.22, bottom - 0.01, x + 0.22, bottom + 0.03), darker(wall, 0.3))
    wood = _between(rng, (0.72, 0.46, 0.24), (0.58, 0.34, 0.20))
    pen.gradient(polygon((0.07, ground), (0.93, ground), (1.03, 0.94), (-0.03, 0.94)), lighter(wood, 0.28), wood)
    pen.fill(box(-0.1, 0.94, 1.1, 1.1), darker(wood, 0.4))
    pen.fill(box(0.07, ground, 0.93, ground + 0.022), lighter(wood, 0.55))


@place("forest", "in the forest", shadow=0.4)
def draw_forest(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    light = _between(rng, (0.62, 0.80, 0.50), (0.54, 0.76, 0.60))
    pen.gradient(box(0, 0, 1, ground + 0.05), darker(light, 0.35), light)
    for x in (0.28, 0.42, 0.58, 0.72):
        x, wide = x + rng.uniform(-0.04, 0.04), rng.uniform(0.02, 0.035)
        pen.fill(box(x - wide, 0, x + wide, ground + 0.05), darker(light, 0.38))
    soil = _between(rng, (0.30, 0.42, 0.18), (0.40, 0.36, 0.20))
    _hills(pen, ground + 0.03, rng, 0.04, lighter(soil, 0.12), darker(soil, 0.3))
    for x in (rng.uniform(0.02, 0.1), rng.uniform(0.90, 0.98)):
        foot, bark = ground + rng.uniform(0.06, 0.16), _between(rng, (0.40, 0.26, 0.17), (0.32, 0.20, 0.15))
        roots = polygon((x - 0.14, foot), (x, foot - 0.2), (x + 0.14, foot))
        pen.fill(union(box(x - 0.075, 0, x + 0.075, foot), roots), bark)
        pen.fill(box(x - 0.065, 0, x - 0.015, foot - 0.06, 0.02), lighter(bark, 0.2))
    leaf = _between(rng, (0.10, 0.36, 0.16), (0.16, 0.42, 0.14))
    for i in range(7):
        x, low = i / 6, rng.uniform(0.08, 0.13) + 0.1 * abs(i / 3 - 1)
        pen.fill(oval(x, low * 0.5, 0.13, low * 0.75), lighter(leaf, 0.1 * (i % 2)))
    x, y = _side(rng, 0.13), rng.uniform(0.88, 0.92)
    pen.fill(box(x - 0.024, y, x + 0.024, y + 0.075, 0.01), (0.97, 0.93, 0.84))
    _dome(pen, x, y - 0.065, 0.08, 0.08, (0.86, 0.18, 0.15))
    pen.fill(oval(x - 0.015, y - 0.025, 0.02, 0.018), (1.0, 0.97, 0.93))


@place("street", "on the street")
def draw_street(pen: Pen, ground: float, rng: np.random.Generator) -> None:
    _sky(pen, ground, rng, clouds=1)
    walls = [(0.86, 0.48, 0.38), (0.94, 0.80, 0.52), (0.60, 0.74, 0.80), (0.82, 0.66, 0.72), (0.72, 0.78, 0.58)]
    order = rng.permutation(5)
    edges = (-0.06, 0.27 + rng.uniform(-0.02, 0.03), 0.73 + rng.uniform(-0.03, 0.02), 1.06)
    for i in (1, 0, 2):
        left, right, wall = edges[i], edges[i + 1], walls[order[i]]
        top = ground - (rng.uniform(0.20, 0.26) if i == 1 else rng.uniform(0.38, 0.46))
        pen.fill(polygon((left - 0.03, top), ((left + right) / 2, top - 0.15), (right + 0.03, top)), darker(wall, 0.5))
        pen.fill(box(left, top, right, ground), wall)
        if i != 1:
            x = (max(left, 0) + min(right, 1)) / 2
            for column in (x - 0.06, x + 0.06):
                for y in (top + 0.055, top + 0.195):
                    pen.fill(box(column - 0.036, y, column + 0.036, y + 0.09), (1.0, 0.95, 0.72))
    pen.fill(box(0, ground - 0.01, 1, ground + 0.05), (0.82, 0.81, 0.79))
    pen.fill(box(0, ground + 0.05, 1, ground + 0.072), (0.60, 0.60, 0.60))
    road = _between(rng, (0.36, 0.37, 0.41), (0.45, 0.45, 0.47))
    pen.gradient(box(0, ground + 0.07, 1, 1), lighter(road, 0.12), darker(road, 0.1))
    start = rng.uniform(-0.3, 0.0)
    for i in range(5):
        pen.fill(box(start + 0.32 * i, 0.93, start + 0.32 * i + 0.19, 0.97), (0.97, 0.95, 0.88))


def _studio(colour: Colour) -> DrawPlace:
    """Return a drawing function for a smooth backdrop of the colour."""

    def draw(pen: Pen, ground: float, rng: np.random.Generator) -> None:
        wall = mix(colour, _between(rng, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), 0.08)
        pen.gradient(box(0, 0, 1, ground + 0.11), lighter(wall, 0.08), darker(wall, 0.08))
        pen.gradient(box(0, ground + 0.1, 1, 1), darker(wall, 0.22), darker(wall, 0.10))

    return draw


_WALLS = {
    "red": (0.80, 0.20, 0.20),
    "blue": (0.22, 0.42, 0.80),
    "yellow": (0.96, 0.82, 0.28),
    "green": (0.28, 0.64, 0.34),
    "white": (0.97, 0.97, 0.96),
}
for _name, _colour in _WALLS.items():
    place(f"{_name} wall", f"in front of a {_name} wall", shadow=0.3)(_studio(_colour))
