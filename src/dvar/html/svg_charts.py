"""Line charts as inline SVG that stretches with the page and takes its colours from the page's style sheet.

Curves live in a nested picture that is stretched to the panel, with strokes that keep their width; labels and marks are
placed by percentage beside it, so text keeps its size from a telephone to a printed sheet.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvar.html.elements import Html, element, join

UNITS = 10_000  # of the nested picture's own coordinates, each way
COLUMNS = 600  # a longer curve is thinned to the least and the greatest value in each of so many columns

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A line from values to [0, 1], linear or logarithmic, with round ticks."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, *values: ArrayLike, log: bool = False, room: float = 0.06) -> Scale:
        """Return the scale that holds every finite value with a little room; any range where nothing is finite."""
        every = np.concatenate([np.ravel(np.asarray(value, dtype=np.float64)) for value in values])
        every = every[np.isfinite(every) & ((every > 0) | (not log))]
        if not every.size:
            return cls(0.1 if log else 0.0, 1.0, log)
        low, high = float(every.min()), float(every.max())
        if log:
            spread = max((high / low) ** room, 1.02)
            return cls(low / spread, high * spread, log)
        spread = (high - low) * room or abs(high) * room or 1.0
        return cls(low - spread, high + spread)

    def place(self, values: ArrayLike) -> Floats:
        """Return where on the scale each value lies: 0 at `low`, 1 at `high`."""
        numbers = np.asarray(values, dtype=np.float64)
        if self.log:
            return np.log(numbers / self.low) / math.log(self.high / self.low)
        return (numbers - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> tuple[float, ...]:
        """Return round numbers within the scale: 1, 2 or 5 times powers of ten, some `about` of them."""
        if self.log:
            return self._decades(about)
        step = _nice((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(float(f"{count * step:.12g}") for count in range(first, last + 1))

    def _decades(self, about: int) -> tuple[float, ...]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            found = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
            found = [tick for tick in found if self.low <= tick <= self.high]
            if len(found) <= about + 1:
                break
        return tuple(found)


def panel(
    x: Scale,
    y: Scale | None,
    layers: Sequence[Html],
    *,
    label: str,
    steps: bool,
    tall: bool = False,
    box: tuple[float, float, float, float] | None = None,
) -> Html:
    """Return one panel: grid, layers from back to front, values at the left and, if asked for, steps below.

    `label` is what a screen reader says in place of the picture.  A panel fills the width of its page, unless `box`
    (left, top, width, height) places it in a drawing.
    """
    across = [tick for tick in x.ticks(6) if tick == int(tick)]
    grid = [_upright_tick(x, tick, f"{tick:.0f}" if steps else None) for tick in across]
    if y is not None:
        ticks = y.ticks(4)
        grid += [_level_tick(y, tick, text) for tick, text in zip(ticks, _wordings(y, ticks), strict=True)]
    if box is not None:
        placed = dict(zip(("x", "y", "width", "height"), box, strict=True))
        return element("svg", *grid, *layers, class_="boxed", role="img", aria_label=label, **placed)
    name = " ".join(["panel", *["with-steps"] * steps, *["tall"] * tall])
    return element("svg", *grid, *layers, class_=name, role="img", aria_label=label)


def spark(layers: Sequence[Html], *, label: str) -> Html:
    """Return a small panel without grid or labels."""
    return element("svg", *layers, class_="spark", role="img", aria_label=label)


def curve(x: Scale, y: Scale, steps: ArrayLike, values: ArrayLike, class_: str) -> Html:
    """Return the values as a line over the steps; it breaks where a value is not finite.

    A curve of more than two points a column is drawn by the least and the greatest value of each column, which looks
    the same and keeps the page small.
    """
    path = "".join(_path(x.place(run[0]), y.place(run[1])) for run in _finite_runs(steps, values))
    line = element("path", d=path, class_=class_, vector_effect="non-scaling-stroke")
    return element("svg", line, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%")


def band(x: Scale, first: float, last: float, class_: str) -> Html:
    """Return the whole height between two steps, as far as the panel goes."""
    left, right = np.clip(x.place([first, last]), 0, 1)
    return element("rect", x=_percent(left), width=_percent(right - left), height="100%", class_=class_)


def upright(x: Scale, step: float, class_: str, text: str | None = None) -> Html:
    """Return a vertical line at a step, with its text at the top on the side that has more room."""
    at = float(x.place(step))
    line = element("line", x1=_percent(at), x2=_percent(at), y1="0", y2="100%", class_=class_)
    return join([line, _beside(at, 0.0, text, class_, dy="0.9em")])


def level(y: Scale, value: float, class_: str, text: str) -> Html:
    """Return a horizontal line at a value, with its text above it at the left."""
    at = _percent(1 - float(y.place(value)))
    line = element("line", x1="0", x2="100%", y1=at, y2=at, class_=class_)
    return join([line, element("text", text, x="0", y=at, dx="6", dy="-6", class_=f"note {class_}")])


def dot(x: Scale, y: Scale, step: float, value: float, class_: str, text: str | None = None) -> Html:
    """Return a dot at a point, with its text under it."""
    across, up = float(x.place(step)), 1 - float(y.place(value))
    mark = element("circle", cx=_percent(across), cy=_percent(up), r="3.5", class_=class_)
    return join([mark, _beside(across, up, text, class_, dy="1.4em")])


def _beside(across: float, down: float, text: str | None, class_: str, *, dy: str) -> Html | None:
    if text is None:
        return None
    before = across > 0.5
    return element(
        "text",
        text,
        x=_percent(across),
        y=_percent(down),
        dx="-7" if before else "7",
        dy=dy,
        text_anchor="end" if before else "start",
        class_=f"note {class_}",
    )


def _upright_tick(x: Scale, value: float, text: str | None) -> Html:
    at = _percent(float(x.place(value)))
    line = element("line", x1=at, x2=at, y1="0", y2="100%", class_="grid upright")
    return join([line, element("text", text, x=at, y="100%", dy="1.6em", text_anchor="middle") if text else None])


def _level_tick(y: Scale, value: float, text: str) -> Html:
    at = _percent(1 - float(y.place(value)))
    line = element("line", x1="0", x2="100%", y1=at, y2=at, class_="grid")
    return join([line, element("text", text, x="0", dx="-10", y=at, dy="0.35em", text_anchor="end")])


def _wordings(scale: Scale, ticks: Sequence[float]) -> list[str]:
    """The ticks as text: per cent on a logarithmic scale, else all with the decimals that tell neighbours apart."""
    if scale.log:
        return [f"{100 * tick:.12g} %" for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{digits}f}" if digits <= 6 else f"{tick:.3e}" for tick in ticks]


def _finite_runs(steps: ArrayLike, values: ArrayLike) -> list[tuple[Floats, Floats]]:
    at, height = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(height))
    runs = np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1)
    return [_thinned(at[run], height[run]) for run in runs if run.size]


def _thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    if steps.size <= 2 * COLUMNS:
        return steps, values
    columns = np.array_split(np.arange(steps.size), COLUMNS)
    ends = [sorted((piece[values[piece].argmin()], piece[values[piece].argmax()])) for piece in columns]
    kept = np.unique(np.array([0, *np.ravel(ends), steps.size - 1]))
    return steps[kept], values[kept]


def _path(across: Floats, up: Floats) -> str:
    right = np.rint(across * UNITS).astype(int)
    down = np.rint((1 - up) * UNITS).astype(int)
    points = " ".join(f"{a} {b}" for a, b in zip(right, down, strict=True))
    # a lone point becomes a line of no length, which round caps draw as a dot
    return f"M{points}" if right.size > 1 else f"M{points}h0"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _nice(step: float) -> float:
    """The nearest of 1, 2 and 5 times a power of ten, by ratio."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((power * digit for digit in (1, 2, 5, 10)), key=lambda nice: abs(math.log(nice / step)))
