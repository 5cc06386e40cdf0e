"""Subjects, scenes, and their rendering as images of 64 by 64 pixels."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np
import skia

from dvar.mini.world.canvas import Colour, Look, Pen
from dvar.mini.world.classes import CLASSES
from dvar.mini.world.places import PLACES
from dvar.mini.world.styles import STYLES

SIZE = 64
SHAPES = 6
PARAMETERS = 3 * 3 + 1 + SHAPES
"""Length of `Subject.vector`."""
PATTERNS = ("plain", "striped", "dotted", "checked")
# Hue, saturation and value of each named colour's middle, and how far a subject's colour may lie from it.
COLOURS: dict[str, tuple[Colour, Colour]] = {
    "red": ((0.995, 0.85, 0.85), (0.02, 0.10, 0.10)),
    "orange": ((0.075, 0.88, 0.96), (0.018, 0.08, 0.04)),
    "yellow": ((0.145, 0.80, 0.96), (0.018, 0.12, 0.04)),
    "green": ((0.335, 0.66, 0.66), (0.045, 0.14, 0.14)),
    "turquoise": ((0.490, 0.62, 0.78), (0.025, 0.14, 0.10)),
    "blue": ((0.615, 0.78, 0.78), (0.030, 0.14, 0.14)),
    "purple": ((0.765, 0.60, 0.66), (0.030, 0.12, 0.12)),
    "pink": ((0.930, 0.42, 0.96), (0.025, 0.10, 0.04)),
    "brown": ((0.065, 0.60, 0.46), (0.015, 0.10, 0.08)),
    "white": ((0.120, 0.05, 0.96), (0.100, 0.04, 0.03)),
    "black": ((0.650, 0.15, 0.19), (0.100, 0.10, 0.05)),
}


@dataclass(frozen=True)
class Subject:
    """One individual: what is the same in every image of it.

    Attributes:
        noun: Its class.
        colours: The names of its main, second and accent colour.
        pattern: One of `PATTERNS`.
        jitter: Where each colour is in its name's range: three by three numbers in [-1, 1].
        pattern_scale: In [0, 1].
        shape: Six shape parameters in [0, 1], which its class gives a meaning to.
    """

    noun: str
    colours: tuple[str, str, str]
    pattern: str
    jitter: tuple[float, ...]
    pattern_scale: float
    shape: tuple[float, ...]

    def look(self) -> Look:
        """Return what its drawing function knows of it."""
        main, second, accent = (_colour(name, self.jitter[3 * i : 3 * i + 3]) for i, name in enumerate(self.colours))
        return Look(main, second, accent, self.pattern, self.pattern_scale, self.shape)

    def vector(self) -> np.ndarray:
        """Return the subject's parameters, all in [0, 1]: three RGB colours, pattern scale, shape.

        The second colour of a plain subject is its main colour.
        """
        look = self.look()
        plain = self.pattern == "plain"
        second = look.main if plain else look.second
        return np.array([*look.main, *second, *look.accent, 0.5 if plain else self.pattern_scale, *self.shape])


@dataclass(frozen=True)
class Scene:
    """The differences between two images of one subject.

    Attributes:
        scale: Half of the subject's height, as a share of the image.
        tilt: In degrees.
        x: The middle of its feet, as a share of the width.
        feet: The height of its feet, as a share of the image from the top.
        ground: The height of the horizon.
        light: Factor of the brightness.
        detail: Seed of what else differs in a place.
    """

    place: str
    scale: float = 0.30
    tilt: float = 0.0
    mirror: bool = False
    x: float = 0.5
    feet: float = 0.84
    ground: float = 0.62
    light: float = 1.0
    detail: int = 0
    style: str = "photo"


def _colour(name: str, jitter: tuple[float, ...]) -> Colour:
    middle, reach = COLOURS[name]
    hue, saturation, value = (m + r * j for m, r, j in zip(middle, reach, jitter, strict=True))
    return colorsys.hsv_to_rgb(hue % 1.0, min(max(saturation, 0.0), 1.0), min(max(value, 0.0), 1.0))


def sample_subject(rng: np.random.Generator, noun: str | None = None) -> Subject:
    """Return a random subject of the class, or of any class; its three colours have different names."""
    noun = noun if noun is not None else str(rng.choice(list(CLASSES)))
    main, second, accent = (str(name) for name in rng.choice(list(COLOURS), 3, replace=False))
    pattern = str(rng.choice(PATTERNS, p=(0.34, 0.22, 0.22, 0.22)))
    jitter = tuple(rng.uniform(-1, 1, 9).tolist())
    return Subject(
        noun, (main, second, accent), pattern, jitter, float(rng.uniform()), tuple(rng.uniform(0, 1, SHAPES).tolist())
    )


def sample_scene(rng: np.random.Generator, place: str | None = None, style: str | None = None) -> Scene:
    """Return a random scene in the place, or any place, and in the style, or as a photo nine times in ten."""
    if style is None:
        style = "photo" if rng.uniform() < 0.9 else str(rng.choice([name for name in STYLES if name != "photo"]))
    scale = float(rng.uniform(0.26, 0.38))
    return Scene(
        place=place if place is not None else str(rng.choice(list(PLACES))),
        scale=scale,
        tilt=float(rng.normal(0, 5)),
        mirror=bool(rng.uniform() < 0.5),
        x=float(rng.uniform(0.4, 0.6)),
        feet=float(rng.uniform(0.82, 0.94)),
        ground=float(rng.uniform(0.54, 0.68)),
        light=float(rng.uniform(0.88, 1.08)),
        detail=int(rng.integers(2**31)),
        style=style,
    )


def render(subject: Subject, scene: Scene, size: int = SIZE) -> np.ndarray:
    """Return the image of a subject in a scene, uint8 [size, size, 3]."""
    return STYLES[scene.style](_paint(subject, scene, size, with_place=True)[..., :3])


def silhouette(subject: Subject, scene: Scene, size: int = SIZE) -> np.ndarray:
    """Return where the subject is, without its shadow: float32 [size, size] in [0, 1]."""
    return _paint(subject, scene, size, with_place=False)[..., 3].astype(np.float32) / 255


def _paint(subject: Subject, scene: Scene, size: int, with_place: bool) -> np.ndarray:
    surface = skia.Surface.MakeRasterN32Premul(size, size)
    canvas = surface.getCanvas()
    canvas.scale(size, size)
    pen = Pen(canvas)
    if with_place:
        place = PLACES[scene.place]
        place.draw(pen, scene.ground, np.random.default_rng(scene.detail))
        shadow = skia.Paint(
            Color4f=skia.Color4f(0.02, 0.02, 0.06, place.shadow),
            MaskFilter=skia.MaskFilter.MakeBlur(skia.kNormal_BlurStyle, 0.018 * scene.scale / 0.3),
            AntiAlias=True,
        )
        wide, high = scene.scale * 0.85, scene.scale * 0.17
        x, y = scene.x + scene.scale * 0.12, scene.feet
        canvas.drawOval(skia.Rect.MakeLTRB(x - wide, y - high, x + wide, y + high), shadow)
    canvas.save()
    canvas.translate(scene.x, scene.feet)
    canvas.rotate(scene.tilt)
    canvas.scale(-scene.scale if scene.mirror else scene.scale, scene.scale)
    canvas.translate(0, -1)
    CLASSES[subject.noun](pen, subject.look())
    canvas.restore()
    pixels = surface.toarray(colorType=skia.kRGBA_8888_ColorType)
    if with_place and scene.light != 1.0:
        lit = np.clip(pixels[..., :3] * scene.light, 0, 255)
        pixels = np.concatenate([lit.astype(np.uint8), pixels[..., 3:]], axis=-1)
    return np.ascontiguousarray(pixels)
