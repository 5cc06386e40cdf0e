"""Charts in SVG: scales, ticks and curves."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvar.html.svg_charts import COLUMNS, UNITS, Scale, curve, panel

numbers = st.floats(-1e6, 1e6, allow_subnormal=False)


def _read_points(svg: str) -> list[list[tuple[int, int]]]:
    """Return the points of a curve's path, one list for each unbroken piece."""
    pieces = re.search(r' d="([^"]*)"', svg)
    assert pieces
    pairs = [re.findall(r"(-?\d+) (-?\d+)", piece) for piece in pieces[1].split("M")[1:]]
    return [[(int(x), int(y)) for x, y in piece] for piece in pairs]


@given(low=numbers, width=st.floats(1e-7, 1e6))
def test_linear_ticks_lie_within_the_scale_and_are_neither_few_nor_many(low: float, width: float) -> None:
    scale = Scale(low, low + max(width, 1e-6 * abs(low)))
    ticks = scale.ticks(4)
    slack = 1e-8 * max(abs(scale.low), abs(scale.high))
    assert 2 <= len(ticks) <= 8
    assert all(scale.low - slack <= tick <= scale.high + slack for tick in ticks)


def test_ticks_are_round() -> None:
    assert Scale(0.0, 1030.0).ticks(6) == (0, 200, 400, 600, 800, 1000)
    assert Scale(0.04257, 0.04331).ticks(4) == (0.0426, 0.0428, 0.0430, 0.0432)
    assert Scale(0.1, 1.2, log=True).ticks(4) == (0.1, 0.2, 0.5, 1.0)


def test_labels_have_the_decimals_that_distinguish_neighbours() -> None:
    svg = panel(Scale(0, 100), Scale(0.04257, 0.04331), [], label="a loss", steps=False, tall=False)
    assert re.findall(r">([\d.]+)</text>", svg) == ["0.0426", "0.0428", "0.0430", "0.0432"]


@given(values=st.lists(st.floats(0.01, 1e6), min_size=1), log=st.booleans())
def test_a_scale_covers_all_its_values(values: list[float], log: bool) -> None:
    places = Scale.around(values, log=log).place(values)
    assert np.all((places > 0) & (places < 1))


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]])
def test_a_scale_around_nothing_finite_is_still_a_scale(values: list[float]) -> None:
    scale = Scale.around(values)
    assert scale.low < scale.high


def test_a_curve_goes_from_corner_to_corner_with_larger_values_higher() -> None:
    assert _read_points(curve(Scale(0, 2), Scale(10, 20), [0, 1, 2], [10, 15, 20], "a")) == [
        [(0, UNITS), (UNITS // 2, UNITS // 2), (UNITS, 0)]
    ]


def test_a_curve_breaks_where_a_value_is_not_finite() -> None:
    values = [1, 2, math.nan, 3, math.inf, 4, 5]
    pieces = _read_points(curve(Scale(0, 7), Scale(0, 7), range(7), values, "a"))
    assert [len(piece) for piece in pieces] == [2, 1, 2]


def test_a_curve_of_nothing_is_empty() -> None:
    assert _read_points(curve(Scale(0, 1), Scale(0, 1), [], [], "a")) == []


@settings(max_examples=30)
@given(seed=st.integers(0, 1000), count=st.integers(2 * COLUMNS + 1, 9000))
def test_a_long_curve_is_thinned_but_keeps_its_ends_and_extremes(seed: int, count: int) -> None:
    values = np.random.default_rng(seed).uniform(0, 1, count)
    [points] = _read_points(curve(Scale(0, count - 1), Scale(0, 1), range(count), values, "a"))
    lefts, tops = [x for x, _ in points], [y for _, y in points]
    assert len(points) <= 2 * COLUMNS + 2
    assert lefts == sorted(lefts)
    assert points[0] == (0, round(UNITS * (1 - values[0])))
    assert points[-1] == (UNITS, round(UNITS * (1 - values[-1])))
    assert (min(tops), max(tops)) == (round(UNITS * (1 - values.max())), round(UNITS * (1 - values.min())))
