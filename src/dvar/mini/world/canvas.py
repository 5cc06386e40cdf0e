"""The pen that draws every thing and place of the bundled world, and the outlines it draws."""

# A thing is drawn in its own box: x and y in [-1, 1], y downwards, its feet on y = 1.  A place is drawn in the unit
# square, (0, 0) top left.  Light falls from the upper left.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import skia

Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1]."""


@dataclass(frozen=True)
class Look:
    """A subject as drawing functions see it: colours, pattern, and six shape parameters in [0, 1]."""

    main: Colour
    second: Colour
    accent: Colour
    pattern: str
    pattern_scale: float
    shape: tuple[float, ...]

    def between(self, index: int, low: float, high: float) -> float:
        """Return shape parameter ``index``, scaled from [0, 1] to [low, high]."""
        return low + (high - low) * self.shape[index]


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Return ``a`` with ``share`` of ``b`` in it."""
    red, green, blue = (x + (y - x) * share for x, y in zip(a, b, strict=True))
    return red, green, blue


def darker(colour: Colour, share: float = 0.4) -> Colour:
    """Return a colour with ``share`` of near-black in it."""
    return mix(colour, (0.06, 0.05, 0.09), share)


def lighter(colour: Colour, share: float = 0.4) -> Colour:
    """Return a colour with ``share`` of white in it."""
    return mix(colour, (1.0, 1.0, 1.0), share)


def oval(x: float, y: float, rx: float, ry: float) -> skia.Path:
    """Return an ellipse with centre (x, y) and radii rx, ry."""
    return skia.Path().addOval(skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry))


def box(left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> skia.Path:
    """Return a rectangle with rounded corners."""
    return skia.Path().addRoundRect(skia.Rect.MakeLTRB(left, top, right, bottom), radius, radius)


def polygon(*points: tuple[float, float]) -> skia.Path:
    """Return a closed polygon through the points."""
    path = skia.Path()
    path.moveTo(*points[0])
    for point in points[1:]:
        path.lineTo(*point)
    path.close()
    return path


def curve(*points: tuple[float, float], closed: bool = False) -> skia.Path:
    """Return a smooth (Catmull-Rom) curve through the points."""
    n = len(points)

    def at(i: int) -> tuple[float, float]:
        return points[i % n] if closed else points[min(max(i, 0), n - 1)]

    path = skia.Path()
    path.moveTo(*points[0])
    for i in range(n if closed else n - 1):
        (ax, ay), (bx, by), (cx, cy), (dx, dy) = at(i - 1), at(i), at(i + 1), at(i + 2)
        path.cubicTo(bx + (cx - ax) / 6, by + (cy - ay) / 6, cx - (dx - bx) / 6, cy - (dy - by) / 6, cx, cy)
    if closed:
        path.close()
    return path


def turned(profile: Sequence[tuple[float, float]]) -> skia.Path:
    """Return a symmetric outline, as of a body turned on a lathe: ``profile`` is (half width, y) from top to bottom."""
    right = curve(*profile)
    path = skia.Path(right)
    mirrored = curve(*[(-x, y) for x, y in reversed(profile)])
    path.addPath(mirrored, skia.Path.kExtend_AddPathMode)
    path.close()
    return path


def union(*paths: skia.Path) -> skia.Path:
    """Return one outline around all the paths."""
    whole = paths[0]
    for path in paths[1:]:
        outline = skia.Op(whole, path, skia.PathOp.kUnion_PathOp)
        whole = outline if outline is not None else whole
    return whole


class Pen:
    """Draws filled, shaded, outlined shapes on a Skia canvas, in the canvas's current coordinates."""

    def __init__(self, canvas: Any) -> None:
        self.canvas = canvas

    def fill(self, path: skia.Path, colour: Colour, alpha: float = 1.0) -> None:
        """Draw a flat area, without shading or outline."""
        self.canvas.drawPath(path, skia.Paint(Color4f=skia.Color4f(*colour, alpha), AntiAlias=True))

    def part(self, path: skia.Path, colour: Colour, outline: float = 0.045, shade: float = 0.3) -> None:
        """Draw a solid part: filled, lit from the upper left, outlined in a darker tone of its colour."""
        self.canvas.save()
        self.canvas.clipPath(path, True)
        self.canvas.drawColor(skia.Color4f(*colour, 1.0))
        self._light(path, shade)
        self.canvas.restore()
        self.line(path, darker(colour, 0.55), outline)

    def body(self, path: skia.Path, look: Look, outline: float = 0.045, shade: float = 0.3) -> None:
        """Draw the largest part of a thing: in the main colour with its pattern in the second, lit and outlined."""
        self.canvas.save()
        self.canvas.clipPath(path, True)
        self.canvas.drawColor(skia.Color4f(*look.main, 1.0))
        self._pattern(path.computeTightBounds(), look)
        self._light(path, shade)
        self.canvas.restore()
        self.line(path, darker(look.main, 0.55), outline)

    def line(self, path: skia.Path, colour: Colour, width: float) -> None:
        """Draw a line along the path, with round ends."""
        paint = skia.Paint(
            Color4f=skia.Color4f(*colour, 1.0), AntiAlias=True, Style=skia.Paint.kStroke_Style, StrokeWidth=width,
            StrokeCap=skia.Paint.kRound_Cap, StrokeJoin=skia.Paint.kRound_Join,
        )  # fmt: skip
        self.canvas.drawPath(path, paint)

    def tube(self, path: skia.Path, colour: Colour, width: float) -> None:
        """Draw a thick outlined line: a handle, a tail, a leg."""
        self.line(path, darker(colour, 0.55), width + 0.08)
        self.line(path, colour, width)

    def eye(self, x: float, y: float, radius: float) -> None:
        """Draw an eye: white, with a black pupil and a glint."""
        self.fill(oval(x, y, radius, radius), (0.98, 0.98, 0.97))
        self.fill(oval(x, y, radius * 0.62, radius * 0.62), (0.07, 0.06, 0.09))
        self.fill(oval(x - radius * 0.2, y - radius * 0.25, radius * 0.2, radius * 0.2), (1.0, 1.0, 1.0))

    def bead(self, x: float, y: float, radius: float) -> None:
        """Draw a black button eye or nose with a glint."""
        self.fill(oval(x, y, radius, radius), (0.07, 0.06, 0.09))
        self.fill(oval(x - radius * 0.3, y - radius * 0.3, radius * 0.3, radius * 0.3), (0.95, 0.95, 0.97))

    def gradient(self, path: skia.Path, top: Colour, bottom: Colour) -> None:
        """Draw a flat area that changes from one colour at its top to another at its bottom."""
        bounds = path.computeTightBounds()
        shader = skia.GradientShader.MakeLinear(
            [skia.Point(0, bounds.top()), skia.Point(0, bounds.bottom())],
            [skia.Color4f(*top, 1.0).toColor(), skia.Color4f(*bottom, 1.0).toColor()],
        )
        self.canvas.drawPath(path, skia.Paint(Shader=shader, AntiAlias=True))

    def _light(self, path: skia.Path, shade: float) -> None:
        """Lighten the path's upper left and darken its lower right."""
        bounds = path.computeTightBounds()
        shader = skia.GradientShader.MakeLinear(
            [skia.Point(bounds.left(), bounds.top()), skia.Point(bounds.right(), bounds.bottom())],
            [
                skia.Color4f(1, 1, 1, shade).toColor(),
                skia.Color4f(1, 1, 1, 0).toColor(),
                skia.Color4f(0, 0, 0.05, 0).toColor(),
                skia.Color4f(0, 0, 0.05, shade).toColor(),
            ],
            [0.0, 0.4, 0.5, 1.0],
        )
        self.canvas.drawPaint(skia.Paint(Shader=shader))

    def _pattern(self, bounds: skia.Rect, look: Look) -> None:
        """Draw the pattern in the box's units, so that its scale is the subject's and not the part's."""
        paint = skia.Paint(Color4f=skia.Color4f(*look.second, 1.0), AntiAlias=True)
        pitch = 0.28 + 0.22 * look.pattern_scale
        top, left, right, bottom = bounds.top(), bounds.left(), bounds.right(), bounds.bottom()
        rows = int((bottom - top) / pitch) + 2
        middle = (left + right) / 2
        columns = int((right - left) / pitch / 2) + 2
        for row in range(rows):
            y = top + (row + 0.5) * pitch
            if look.pattern == "striped":
                self.canvas.drawRect(skia.Rect.MakeLTRB(left, y, right, y + pitch * 0.46), paint)
            elif look.pattern == "dotted":
                for column in range(-columns, columns + 1):
                    x = middle + (column + 0.5 * (row % 2)) * pitch * 1.1
                    self.canvas.drawCircle(x, y, pitch * 0.3, paint)
            elif look.pattern == "checked":
                for column in range(-columns, columns + 1):
                    if (row + column) % 2 == 0:
                        x = middle + column * pitch
                        self.canvas.drawRect(skia.Rect.MakeLTRB(x, y - pitch / 2, x + pitch, y + pitch / 2), paint)
