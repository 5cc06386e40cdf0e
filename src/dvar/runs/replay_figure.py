"""The figure and the page of a replayed log."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.html import svg_charts
from dvar.html.elements import Html, element, join, page_head
from dvar.html.svg_charts import Scale
from dvar.runs.config import ReplayConfig
from dvar.runs.replay import ReplayOutcome, verdicts
from dvar.stopping.rules import Dvar
from dvar.stopping.trace import Trace

WIDTH, LEFT, RIGHT = 860, 76, 20  # of a picture and its margins


LOSS_HEIGHT, RATIO_HEIGHT, LANE = 190, 130, 26


TOP, BETWEEN, BELOW = 34, 46, 30


def ratios(trace: Trace, rule: Dvar) -> NDArray[np.float64]:
    """Return the ratio after each evaluation of the trace; nan where the rule had none yet."""
    said = (verdict.metrics for verdict in verdicts(trace, rule))
    return np.array([metrics["ratio"] if "total_var" in metrics else np.nan for metrics in said])


def write_picture(
    path: Path, title: str, trace: Trace, outcomes: Sequence[ReplayOutcome], config: ReplayConfig
) -> Path:
    """Return the path, to which the replay was written: a picture (.svg), or a page with it and the sentences (.html).

    Raises: RefusedInput when the folder cannot be written to.
    """
    shown = picture(trace, outcomes, config.window, config.threshold)
    page = _page(title, f"{_curve_name(trace)}, {len(trace.steps)} records to step {trace.last_step}", shown, outcomes)
    text = shown if path.suffix == ".svg" else f"<!doctype html>\n{page}"
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text + "\n", encoding="utf-8", newline="\n")
        os.replace(part, path)
    except OSError as error:
        raise RefusedInput([f"output {path}: {error.strerror or error}; choose another place"]) from error
    return path


def picture(trace: Trace, outcomes: Sequence[ReplayOutcome], window: int, threshold: float) -> Html:
    """Return a drawing that stands by itself: the loss, DVAR's ratio, and where each rule stops.

    The ratio is drawn when DVAR is among the rules; shaded is the window behind its verdict.  Dotted is the ratio of a
    straight line; grey, where it is warming up.
    """
    x = Scale(0.0, max(trace.last_step, 1) * 1.03)
    y = Scale.around(trace.values, room=0.12)
    spoken = next((outcome for outcome in outcomes if outcome.name in ("dvar", "paper")), None)
    marks = [
        svg_charts.upright(x, outcome.stop, "stop" if outcome is spoken else "stop other")
        for outcome in sorted(outcomes, key=lambda outcome: outcome is spoken)
        if outcome.stop is not None
    ]
    behind: list[Html] = []
    if spoken and spoken.verdict and "total_var" in spoken.verdict.metrics:
        behind = [svg_charts.band(x, spoken.verdict.step - window, spoken.verdict.step, "window")]
    line = svg_charts.curve(x, y, trace.steps, trace.values, "signal")
    top, drawn = TOP, [_title(_curve_name(trace), TOP)]
    drawn.append(_panel(x, y, [*behind, *_lost(x, trace), *marks, line], "Loss", top, LOSS_HEIGHT))
    top += LOSS_HEIGHT + BETWEEN
    if spoken:
        drawn.append(_title("Recent variance ÷ whole variance", top))
        drawn.append(_ratio(x, trace, marks, window, threshold, top))
        top += RATIO_HEIGHT + BETWEEN
    drawn += [_title("Where each rule stops", top), _lanes(x, outcomes, top)]
    height = top + LANE * len(outcomes) + BELOW
    style = element("style", Html(_style("charts.css")))
    paper = element("rect", width=WIDTH, height=height, class_="paper")
    says = "; ".join(f"{outcome.name}: {outcome.why}" for outcome in outcomes)
    return element(
        "svg",
        *(style, paper, *drawn),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        width=WIDTH,
        height=height,
        role="img",
        aria_label=says,
    )


def _lost(x: Scale, trace: Trace) -> Iterator[Html]:
    """Where the loss was not finite: a line where that begins, and the stretch in grey."""
    lost = np.flatnonzero(~np.isfinite(trace.values))
    for run in np.split(lost, np.flatnonzero(np.diff(lost) > 1) + 1) if lost.size else ():
        first, last = int(trace.steps[run[0]]), int(trace.steps[run[-1]])
        yield join([svg_charts.band(x, first, last, "warming"), svg_charts.upright(x, first, "lost")])


def _ratio(x: Scale, trace: Trace, marks: Sequence[Html], window: int, threshold: float, top: int) -> Html:
    values = ratios(trace, Dvar(window, threshold))
    reached = values[np.isfinite(values) & (values > 0)]
    y = Scale(min([threshold, *reached]) / 1.4, max([1.0, *reached]) * 1.15, log=True)
    first = trace.first_step
    straight = np.arange(first + window, max(x.high, first + window + 1))
    layers = [
        svg_charts.band(x, first, first + window, "warming"),
        *marks,
        svg_charts.curve(x, y, straight, (window / (straight - first)) ** 2, "null"),
        svg_charts.level(y, threshold, "threshold", f"threshold {100 * threshold:g} %"),
        svg_charts.curve(x, y, trace.steps, np.maximum(values, y.low), "signal"),
    ]
    return _panel(x, y, layers, "Ratio of the variances", top, RATIO_HEIGHT)


def _lanes(x: Scale, outcomes: Sequence[ReplayOutcome], top: int) -> Html:
    """A line for each rule, from the first step to its stop, over the axis of steps."""
    lanes = [_lane(x, outcome, LANE * (row + 0.5)) for row, outcome in enumerate(outcomes)]
    return svg_charts.panel(
        x,
        None,
        lanes,
        label="Stops",
        steps=True,
        box=(LEFT, top, WIDTH - LEFT - RIGHT, LANE * len(outcomes)),
    )


def _lane(x: Scale, outcome: ReplayOutcome, height: float) -> Html:
    end, stop = float(x.place(x.high / 1.03)), outcome.stop
    share = end if stop is None else float(x.place(stop))
    name = element("text", outcome.name, x=0, dx=-10, y=height, dy="0.35em", text_anchor="end")
    line = element(
        "line", x1="0", x2=f"{100 * share:.4g}%", y1=height, y2=height, class_="noise" if stop is None else "stop"
    )
    said = (
        "cannot judge"
        if not outcome.verdict
        else f"{'goes on' if stop is None else stop}, {outcome.verdict.reason.value}"
    )
    mark = None if stop is None else element("circle", cx=f"{100 * share:.4g}%", cy=height, r=3.5, class_="best")
    before = share > 0.75  # then above the line, which would run through it
    text = element(
        "text",
        said,
        x=f"{100 * share:.4g}%",
        y=height,
        dx=-10 if before else 10,
        dy="-0.45em" if before else "0.35em",
        text_anchor="end" if before else "start",
        class_="note" if stop is None else "note stop",
    )
    return join([name, line, mark, text])


def _panel(x: Scale, y: Scale, layers: Sequence[Html], says: str, top: int, height: int) -> Html:
    return svg_charts.panel(x, y, layers, label=says, steps=False, box=(LEFT, top, WIDTH - LEFT - RIGHT, height))


def _title(text: str, top: int) -> Html:
    return element("text", text, x=LEFT, y=top - 12, class_="title")


def _curve_name(trace: Trace) -> str:
    return str(trace.header.get("log", {}).get("metric", "L_det"))


def _page(title: str, curve: str, shown: Html, outcomes: Sequence[ReplayOutcome]) -> Html:
    head = page_head(f"{title} · dvar replay", _style("charts.css") + _style("style.css"), images=False)
    rows = [element("tr", element("th", outcome.name, scope="row"), element("td", outcome.why)) for outcome in outcomes]
    body = element(
        "main",
        element(
            "header",
            element("p", "dvar replay", class_="eyebrow"),
            element("h1", title),
            element("p", curve, class_="standfirst"),
        ),
        element("section", element("div", shown, class_="replay")),
        element("section", element("table", element("tbody", *rows), class_="outcomes")),
    )
    return element("html", head, element("body", body), lang="en")


def _style(name: str) -> str:
    return files("dvar.html").joinpath(name).read_text(encoding="utf-8")
