"""The style of figures."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, NOISE, SIGNAL, LINE = "#22211e", "#6a6761", "#a5a099", "#b8452a", "#e2ded6"
COLOURS = ("#b8452a", "#2f6f8f", "#7a8b2d", "#8a5a99", "#c98b1b", "#4b6b5c", "#a03f6a", "#5d6b9c")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "svg.hashsalt": "dvar",
    "svg.fonttype": "path",
}
DOTS = 160
"""Pixels an inch of a PNG."""


def axes(
    rows: int = 1, columns: int = 1, *, width: float = 8.0, height: float = 2.0, **more: Any
) -> tuple[Figure, Any]:
    """Return a figure and its axes, [rows, columns], in the style of the `matplotlib.rc_context` around the call.

    Args:
        rows: Number of rows of panels.
        columns: Number of columns of panels.
        width: Of the figure, in inches.
        height: Of one row, in inches.
        more: Passed on to `Figure.subplots`.
    """
    figure = Figure(figsize=(width, 0.5 + height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def mark(panel: Axes, step: float, text: str = "", colour: str = SIGNAL, dashes: Any = "-") -> None:
    """Plot a vertical line at ``step``, with ``text`` at its top."""
    panel.axvline(step, color=colour, linewidth=1.0, linestyle=dashes)
    if text:
        panel.annotate(
            text,
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -3),
            textcoords="offset points",
            va="top",
            color=colour,
            fontsize=8,
        )
