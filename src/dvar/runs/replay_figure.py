"""The figure and the page of a replay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from dvar.html import svg_charts
from dvar.html.svg_charts import Scale
from dvar.html.svg_elements import element, join
from dvar.html.templates import read_stylesheet, render, write_page
from dvar.runs.config import ReplayConfig
from dvar.runs.replay import ReplayOutcome, compute_ratios, name_curve
from dvar.stopping.octave import Octave
from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace

WIDTH, LEFT, RIGHT = 860, 76, 20  # of the figure and its margins
TOP, GAP, BOTTOM = 34, 46, 30
LOSS_HEIGHT, RATIO_HEIGHT, LANE_HEIGHT = 190, 130, 26


def write_replay(path: Path, title: str, trace: Trace, outcomes: Sequence[ReplayOutcome], config: ReplayConfig) -> Path:
    """Write a replay as a figure (.svg), or as a page with the figure and the sentences (.html), and return its path.

    Raises:
        RefusedInput: The file cannot be written there.
    """
    figure = plot_replay(trace, outcomes, config.window, config.threshold)
    if path.suffix == ".svg":
        return write_page(path, figure + "\n")
    context = {"title": title, "curve": name_curve(trace), "trace": trace, "figure": figure, "outcomes": outcomes}
    return write_page(path, render("dvar.runs", "replay.html", **context))


def plot_replay(trace: Trace, outcomes: Sequence[ReplayOutcome], window: int, threshold: float) -> Markup:
    """Return a figure of the loss, DVAR's ratio and the step at which each rule stops, as an SVG of its own.

    The ratio is plotted when DVAR is among the rules. The window behind DVAR's verdict is shaded, the ratio of a
    straight line dotted, and the steps without a ratio are grey.
    """
    x = Scale(0.0, max(trace.last_step, 1) * 1.03)
    dvar = next((outcome for outcome in outcomes if outcome.name in ("dvar", "paper")), None)
    stops = [
        svg_charts.upright(x, outcome.stop, "stop" if outcome is dvar else "stop other")
        for outcome in sorted(outcomes, key=lambda outcome: outcome is dvar)
        if outcome.stop is not None
    ]
    parts, top = _plot_loss(x, trace, [*_shade_window(x, dvar, window), *_mark_non_finite(x, trace), *stops]), TOP
    top += LOSS_HEIGHT + GAP
    if dvar:
        parts += _plot_ratio(x, trace, stops, window, threshold, top)
        top += RATIO_HEIGHT + GAP
    parts += _plot_lanes(x, outcomes, top)
    height = top + LANE_HEIGHT * len(outcomes) + BOTTOM
    return element(
        "svg",
        element("style", read_stylesheet(("charts.css",))),
        element("rect", width=WIDTH, height=height, class_="paper"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label="; ".join(f"{outcome.name}: {outcome.sentence}" for outcome in outcomes),
    )


def layer_ratios(
    x: Scale, trace: Trace, ratios: NDArray[np.float64], window: int, threshold: float, stops: Sequence[Markup]
) -> tuple[Scale, list[Markup]]:
    """Return the scale and the layers of a panel of DVAR's ratio, with that of a straight line and the threshold.

    Args:
        x: Scale of the steps.
        trace: The trace behind the ratios.
        ratios: Ratio after each evaluation, nan where there is none.
        window: DVAR's window.
        threshold: DVAR's threshold.
        stops: Marks of stops, from `svg_charts.upright`.
    """
    positive = ratios[np.isfinite(ratios) & (ratios > 0)]
    y = Scale(min([threshold, *positive]) / 1.4, max([1.0, *positive]) * 1.15, log=True)
    first = trace.first_step
    line_steps = np.arange(first + window, max(x.high, first + window + 1))
    return y, [
        svg_charts.band(x, first, first + window, "warming"),
        *stops,
        svg_charts.curve(x, y, line_steps, (window / (line_steps - first)) ** 2, "null"),
        svg_charts.level(y, threshold, "threshold", f"threshold {100 * threshold:g} %"),
        svg_charts.curve(x, y, trace.steps, np.maximum(ratios, y.low), "signal"),
    ]


def layer_shares(
    x: Scale, trace: Trace, shares: NDArray[np.float64], ready: int, stops: Sequence[Markup]
) -> tuple[Scale, list[Markup]]:
    """Return the scale and the layers of a panel of what the last doubling of the steps brought, for the rule octave.

    Args:
        x: Scale of the steps.
        trace: The trace behind the shares.
        shares: Share of the gain that the last doubling brought, after each evaluation; nan where there is none.
        ready: The step before which the rule cannot stop.
        stops: Marks of stops, from `svg_charts.upright`.
    """
    limit, measured = Octave().share, np.flatnonzero(np.isfinite(shares))
    y = Scale(min([0.0, *shares[measured]]) - 0.05, max([1.0, *shares[measured]]) * 1.05)
    return y, [
        svg_charts.band(x, trace.judged_from, ready, "warming"),
        *stops,
        svg_charts.level(y, limit, "threshold", f"limit {100 * limit:g} %"),
        svg_charts.curve(x, y, trace.steps, shares, "signal"),
        *[svg_charts.dot(x, y, int(trace.steps[last]), shares[last], "best") for last in measured[-1:]],
    ]


def _plot_loss(x: Scale, trace: Trace, marks: Sequence[Markup]) -> list[Markup]:
    y = Scale.around(trace.values, room=0.12)
    line = svg_charts.curve(x, y, trace.steps, trace.values, "signal")
    return [_title(name_curve(trace), TOP), _panel(x, y, [*marks, line], "Loss", TOP, LOSS_HEIGHT)]


def _shade_window(x: Scale, outcome: ReplayOutcome | None, window: int) -> Iterator[Markup]:
    """Shade the window behind the verdict of DVAR, if it had a ratio."""
    if outcome and outcome.verdict and "total_var" in outcome.verdict.metrics:
        yield svg_charts.band(x, outcome.verdict.step - window, outcome.verdict.step, "window")


def _mark_non_finite(x: Scale, trace: Trace) -> Iterator[Markup]:
    """Mark each stretch where the loss was not finite: grey, with a line where it begins."""
    indices = np.flatnonzero(~np.isfinite(trace.values))
    for stretch in np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1) if indices.size else ():
        first, last = int(trace.steps[stretch[0]]), int(trace.steps[stretch[-1]])
        yield join([svg_charts.band(x, first, last, "warming"), svg_charts.upright(x, first, "lost")])


def _plot_ratio(
    x: Scale, trace: Trace, stops: Sequence[Markup], window: int, threshold: float, top: int
) -> list[Markup]:
    ratios = compute_ratios(trace, Dvar(window, threshold))
    y, layers = layer_ratios(x, trace, ratios, window, threshold, stops)
    title = _title("Recent variance ÷ whole variance", top)
    return [title, _panel(x, y, layers, "Ratio of the variances", top, RATIO_HEIGHT)]


def _plot_lanes(x: Scale, outcomes: Sequence[ReplayOutcome], top: int) -> list[Markup]:
    """Return a line for each rule, from the first step to its stop, over the axis of steps."""
    lanes = [_plot_lane(x, outcome, LANE_HEIGHT * (row + 0.5)) for row, outcome in enumerate(outcomes)]
    box = (LEFT, top, WIDTH - LEFT - RIGHT, LANE_HEIGHT * len(outcomes))
    return [_title("Where each rule stops", top), svg_charts.panel(x, None, lanes, label="Stops", steps=True, box=box)]


def _plot_lane(x: Scale, outcome: ReplayOutcome, y: float) -> Markup:
    stop = outcome.stop
    share = float(x.place(x.high / 1.03 if stop is None else stop))
    end, before = f"{100 * share:.4g}%", share > 0.75  # a label before the end stands above the line, clear of it
    label = (
        f"{'goes on' if stop is None else stop}, {outcome.verdict.reason.value}" if outcome.verdict else "cannot judge"
    )
    return join(
        [
            element("text", outcome.name, x=0, dx=-10, y=y, dy="0.35em", text_anchor="end"),
            element("line", x1="0", x2=end, y1=y, y2=y, class_="noise" if stop is None else "stop"),
            None if stop is None else element("circle", cx=end, cy=y, r=3.5, class_="best"),
            element(
                "text",
                label,
                x=end,
                y=y,
                dx=-10 if before else 10,
                dy="-0.45em" if before else "0.35em",
                text_anchor="end" if before else "start",
                class_="note" if stop is None else "note stop",
            ),
        ]
    )


def _panel(x: Scale, y: Scale, layers: Sequence[Markup], label: str, top: int, height: int) -> Markup:
    return svg_charts.panel(x, y, layers, label=label, steps=False, box=(LEFT, top, WIDTH - LEFT - RIGHT, height))


def _title(text: str, top: int) -> Markup:
    return element("text", text, x=LEFT, y=top - 12, class_="title")
