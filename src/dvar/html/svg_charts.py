"""Line charts as inline SVG that stretches with the page and takes its colours from the page's stylesheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import ArrayLike, NDArray

from dvar.html.svg_elements import element, join

# A curve is a nested SVG that is stretched to its panel, with strokes that keep their width. Labels and marks are
# placed by percentage beside it, so text keeps its size from a telephone to a printed sheet.
UNITS = 10_000  # width and height of a curve in its own coordinates
COLUMNS = 600  # a longer curve is thinned to the least and the greatest value in each of this many columns

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic scale from values to [0, 1], with round ticks.

    Attributes:
        low: The value at 0.
        high: The value at 1.
        log: Whether the scale is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, *values: ArrayLike, log: bool = False, room: float = 0.06) -> Scale:
        """Return a scale that holds every finite value, and some scale when no value is finite.

        Args:
            values: Arrays of any shape.
            log: Whether the scale is logarithmic; it then holds every positive value.
            room: Free space at each end, relative to the range of the values.
        """
        finite = np.concatenate([np.ravel(np.asarray(value, dtype=np.float64)) for value in values])
        finite = finite[np.isfinite(finite) & ((finite > 0) | (not log))]
        if not finite.size:
            return cls(0.1 if log else 0.0, 1.0, log)
        low, high = float(finite.min()), float(finite.max())
        if log:
            spread = max((high / low) ** room, 1.02)
            return cls(low / spread, high * spread, log)
        spread = (high - low) * room or abs(high) * room or 1.0
        return cls(low - spread, high + spread)

    def place(self, values: ArrayLike) -> Floats:
        """Return the position of each value: 0 at `low`, 1 at `high`."""
        numbers = np.asarray(values, dtype=np.float64)
        if self.log:
            return np.log(numbers / self.low) / math.log(self.high / self.low)
        return (numbers - self.low) / (self.high - self.low)

    def ticks(self, about: int) -> tuple[float, ...]:
        """Return round numbers within the scale, roughly ``about`` of them: 1, 2 or 5 times powers of ten."""
        if self.log:
            return self._log_ticks(about)
        step = _round_step((self.high - self.low) / about)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return tuple(float(f"{count * step:.12g}") for count in range(first, last + 1))

    def _log_ticks(self, about: int) -> tuple[float, ...]:
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in digits]
            ticks = [tick for tick in ticks if self.low <= tick <= self.high]
            if len(ticks) <= about + 1:
                break
        return tuple(ticks)


def panel(
    x: Scale,
    y: Scale | None,
    layers: Sequence[Markup],
    *,
    label: str,
    steps: bool,
    tall: bool = False,
    box: tuple[float, float, float, float] | None = None,
) -> Markup:
    """Return a panel: a grid, layers over it, and labels.

    Args:
        x: Scale of the steps.
        y: Scale of the values, labelled at the left; None for a panel without values.
        layers: Curves and marks from back to front.
        label: Description for screen readers.
        steps: Whether the steps are labelled below.
        tall: Whether the panel is higher than others.
        box: Left, top, width and height inside another SVG; by default the panel fills the width of its page.
    """
    step_ticks = [tick for tick in x.ticks(6) if tick == int(tick)]
    grid = [_upright_tick(x, tick, f"{tick:.0f}" if steps else None) for tick in step_ticks]
    if y is not None:
        ticks = y.ticks(4)
        grid += [_level_tick(y, tick, text) for tick, text in zip(ticks, _format_ticks(y, ticks), strict=True)]
    if box is not None:
        position = dict(zip(("x", "y", "width", "height"), box, strict=True))
        return element("svg", *grid, *layers, class_="boxed", role="img", aria_label=label, **position)
    classes = " ".join(["panel", *["with-steps"] * steps, *["tall"] * tall])
    return element("svg", *grid, *layers, class_=classes, role="img", aria_label=label)


def spark(layers: Sequence[Markup], *, label: str) -> Markup:
    """Return a small panel without grid or labels."""
    return element("svg", *layers, class_="spark", role="img", aria_label=label)


def curve(x: Scale, y: Scale, steps: ArrayLike, values: ArrayLike, class_: str) -> Markup:
    """Return values over steps as a line that breaks where a value is not finite.

    A long curve is thinned to the least and the greatest value of each of `COLUMNS` columns, which looks the same and
    keeps the page small.
    """
    path = "".join(_path(x.place(xs), y.place(ys)) for xs, ys in _finite_stretches(steps, values))
    line = element("path", d=path, class_=class_, vector_effect="non-scaling-stroke")
    return element("svg", line, viewBox=f"0 0 {UNITS} {UNITS}", preserveAspectRatio="none", width="100%", height="100%")


def band(x: Scale, first: float, last: float, class_: str) -> Markup:
    """Return a rectangle over the whole height between two steps, clipped to the panel."""
    left, right = np.clip(x.place([first, last]), 0, 1)
    return element("rect", x=_percent(left), width=_percent(right - left), height="100%", class_=class_)


def upright(x: Scale, step: float, class_: str, text: str | None = None) -> Markup:
    """Return a vertical line at a step, with its text at the top on the side that has more space."""
    position = float(x.place(step))
    line = element("line", x1=_percent(position), x2=_percent(position), y1="0", y2="100%", class_=class_)
    return join([line, _label(position, 0.0, text, class_, dy="0.9em")])


def level(y: Scale, value: float, class_: str, text: str) -> Markup:
    """Return a horizontal line at a value, with its text above it at the left."""
    top = _percent(1 - float(y.place(value)))
    line = element("line", x1="0", x2="100%", y1=top, y2=top, class_=class_)
    return join([line, element("text", text, x="0", y=top, dx="6", dy="-6", class_=f"note {class_}")])


def dot(x: Scale, y: Scale, step: float, value: float, class_: str, text: str | None = None) -> Markup:
    """Return a dot at a point, with its text under it."""
    left, top = float(x.place(step)), 1 - float(y.place(value))
    mark = element("circle", cx=_percent(left), cy=_percent(top), r="3.5", class_=class_)
    return join([mark, _label(left, top, text, class_, dy="1.4em")])


def _label(left: float, top: float, text: str | None, class_: str, *, dy: str) -> Markup | None:
    if text is None:
        return None
    before = left > 0.5
    return element(
        "text",
        text,
        x=_percent(left),
        y=_percent(top),
        dx="-7" if before else "7",
        dy=dy,
        text_anchor="end" if before else "start",
        class_=f"note {class_}",
    )


def _upright_tick(x: Scale, value: float, text: str | None) -> Markup:
    left = _percent(float(x.place(value)))
    line = element("line", x1=left, x2=left, y1="0", y2="100%", class_="grid upright")
    return join([line, element("text", text, x=left, y="100%", dy="1.6em", text_anchor="middle") if text else None])


def _level_tick(y: Scale, value: float, text: str) -> Markup:
    top = _percent(1 - float(y.place(value)))
    line = element("line", x1="0", x2="100%", y1=top, y2=top, class_="grid")
    return join([line, element("text", text, x="0", dx="-10", y=top, dy="0.35em", text_anchor="end")])


def _format_ticks(scale: Scale, ticks: Sequence[float]) -> list[str]:
    """Return the labels of ticks: percentages on a logarithmic scale, else numbers with as many decimals as needed."""
    if scale.log:
        return [f"{100 * tick:.12g} %" for tick in ticks]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{digits}f}" if digits <= 6 else f"{tick:.3e}" for tick in ticks]


def _finite_stretches(steps: ArrayLike, values: ArrayLike) -> list[tuple[Floats, Floats]]:
    """Return the steps and values of each stretch of finite values, thinned."""
    xs, ys = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    finite = np.flatnonzero(np.isfinite(ys))
    stretches = np.split(finite, np.flatnonzero(np.diff(finite) > 1) + 1)
    return [_thin(xs[indices], ys[indices]) for indices in stretches if indices.size]


def _thin(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    if steps.size <= 2 * COLUMNS:
        return steps, values
    columns = np.array_split(np.arange(steps.size), COLUMNS)
    extremes = [(column[values[column].argmin()], column[values[column].argmax()]) for column in columns]
    indices = np.unique(np.array([0, *np.ravel(extremes), steps.size - 1]))
    return steps[indices], values[indices]


def _path(x: Floats, y: Floats) -> str:
    """Return the commands of a path through points given by their positions on the two scales."""
    lefts, tops = np.rint(x * UNITS).astype(int), np.rint((1 - y) * UNITS).astype(int)
    points = " ".join(f"{left} {top}" for left, top in zip(lefts, tops, strict=True))
    # A single point becomes a line of no length, which round caps show as a dot.
    return f"M{points}" if lefts.size > 1 else f"M{points}h0"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def _round_step(step: float) -> float:
    """Return the number nearest to ``step``, by ratio, of 1, 2 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return min((power * digit for digit in (1, 2, 5, 10)), key=lambda number: abs(math.log(number / step)))
