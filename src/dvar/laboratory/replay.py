"""A recorded curve judged again: when each rule would have stopped, why, and a picture of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dvar.errors import RefusedInput
from dvar.laboratory import charts
from dvar.laboratory.charts import Scale
from dvar.laboratory.config import ReplayConfig
from dvar.laboratory.markup import Html, element, join, page_head
from dvar.stopper.rules import Criterion, Dvar, EmaPercentile, Hall, Plateau, Trend
from dvar.stopper.trace import LOSS, RELATIVE_LOSS, Trace
from dvar.stopper.verdict import Verdict

RULES: dict[str, Callable[[ReplayConfig], Criterion]] = {
    "dvar": lambda config: Dvar(config.window, config.threshold),
    "paper": lambda config: Dvar(config.window, config.threshold, strict_paper=True),
    "ema": lambda config: EmaPercentile(config.window, config.ema_threshold),
    "hall": lambda config: Hall(config.window, config.hall_threshold),
    "trend": lambda config: Trend(config.window, config.trend_threshold, metric=RELATIVE_LOSS),
    "plateau": lambda config: Plateau(LOSS, config.patience, config.min_delta),
}
"""The rules of `dvar replay`, by the name of each: its settings to the rule."""

WIDTH, LEFT, RIGHT = 860, 76, 20  # of a picture and its margins
LOSS_HEIGHT, RATIO_HEIGHT, LANE = 190, 130, 26
TOP, BETWEEN, BELOW = 34, 46, 30


@dataclass(frozen=True)
class Outcome:
    """What a rule made of a trace: its verdict where it stops, else the one at the end.

    `verdict` is None where the rule cannot judge such a trace; `refused` then says why.
    """

    name: str
    verdict: Verdict | None
    refused: str = ""

    @property
    def stop(self) -> int | None:
        """The step at which the rule stops; None where it does not."""
        return self.verdict.step if self.verdict and self.verdict.stop else None

    @property
    def why(self) -> str:
        """The rule's sentence, for a person."""
        return self.verdict.sentence if self.verdict else self.refused


def verdicts(trace: Trace, rule: Criterion) -> Iterator[Verdict]:
    """Yield what the rule said after each evaluation, as if the trace were being recorded."""
    replayed = Trace(trace.header)
    for row in trace.records:
        replayed.record(**row)
        if LOSS in row:
            yield rule(replayed)


def replayed(trace: Trace, config: ReplayConfig) -> list[Outcome]:
    """Return the outcome of each rule asked for, in the order of `RULES`.

    Raises: RefusedInput when the settings of a rule are wrong, or no rule can judge the trace.
    """
    names = [name for name in RULES if name in config.rule or "all" in config.rule]
    rules, problems = {}, []
    for name in names:
        try:
            rules[name] = RULES[name](config)
        except RefusedInput as error:
            problems += [said for said in error.problems if said not in problems]
    if problems:
        raise RefusedInput(problems)
    outcomes = [_outcome(name, trace, rule) for name, rule in rules.items()]
    if not any(outcome.verdict for outcome in outcomes):
        raise RefusedInput(outcome.refused for outcome in outcomes)
    return outcomes


def _outcome(name: str, trace: Trace, rule: Criterion) -> Outcome:
    verdict = None
    try:
        for verdict in verdicts(trace, rule):
            if verdict.stop:
                break
    except RefusedInput as error:
        return Outcome(name, None, str(error))
    return Outcome(name, verdict, "" if verdict else "the trace holds no evaluation")


def ratios(trace: Trace, rule: Dvar) -> NDArray[np.float64]:
    """Return the ratio after each evaluation of the trace; nan where the rule had none yet."""
    said = (verdict.metrics for verdict in verdicts(trace, rule))
    return np.array([metrics["ratio"] if "total_var" in metrics else np.nan for metrics in said])


# --- the picture ----------------------------------------------------------------------------------------------------


def write_picture(path: Path, title: str, trace: Trace, outcomes: Sequence[Outcome], config: ReplayConfig) -> Path:
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


def picture(trace: Trace, outcomes: Sequence[Outcome], window: int, threshold: float) -> Html:
    """Return a drawing that stands by itself: the loss, DVAR's ratio, and where each rule stops.

    The ratio is drawn when DVAR is among the rules; shaded is the window behind its verdict.  Dotted is the ratio of a
    straight line; grey, where it is warming up.
    """
    x = Scale(0.0, max(trace.last_step, 1) * 1.03)
    y = Scale.around(trace.values, room=0.12)
    spoken = next((outcome for outcome in outcomes if outcome.name in ("dvar", "paper")), None)
    marks = [
        charts.upright(x, outcome.stop, "stop" if outcome is spoken else "stop other")
        for outcome in sorted(outcomes, key=lambda outcome: outcome is spoken)
        if outcome.stop is not None
    ]
    behind: list[Html] = []
    if spoken and spoken.verdict and "total_var" in spoken.verdict.metrics:
        behind = [charts.band(x, spoken.verdict.step - window, spoken.verdict.step, "window")]
    line = charts.curve(x, y, trace.steps, trace.values, "signal")
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
        yield join([charts.band(x, first, last, "warming"), charts.upright(x, first, "lost")])


def _ratio(x: Scale, trace: Trace, marks: Sequence[Html], window: int, threshold: float, top: int) -> Html:
    values = ratios(trace, Dvar(window, threshold))
    reached = values[np.isfinite(values) & (values > 0)]
    y = Scale(min([threshold, *reached]) / 1.4, max([1.0, *reached]) * 1.15, log=True)
    first = trace.first_step
    straight = np.arange(first + window, max(x.high, first + window + 1))
    layers = [
        charts.band(x, first, first + window, "warming"),
        *marks,
        charts.curve(x, y, straight, (window / (straight - first)) ** 2, "null"),
        charts.level(y, threshold, "threshold", f"threshold {100 * threshold:g} %"),
        charts.curve(x, y, trace.steps, np.maximum(values, y.low), "signal"),
    ]
    return _panel(x, y, layers, "Ratio of the variances", top, RATIO_HEIGHT)


def _lanes(x: Scale, outcomes: Sequence[Outcome], top: int) -> Html:
    """A line for each rule, from the first step to its stop, over the axis of steps."""
    lanes = [_lane(x, outcome, LANE * (row + 0.5)) for row, outcome in enumerate(outcomes)]
    return charts.panel(
        x,
        None,
        lanes,
        label="Stops",
        steps=True,
        box=(LEFT, top, WIDTH - LEFT - RIGHT, LANE * len(outcomes)),
    )


def _lane(x: Scale, outcome: Outcome, height: float) -> Html:
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
    return charts.panel(x, y, layers, label=says, steps=False, box=(LEFT, top, WIDTH - LEFT - RIGHT, height))


def _title(text: str, top: int) -> Html:
    return element("text", text, x=LEFT, y=top - 12, class_="title")


def _curve_name(trace: Trace) -> str:
    return str(trace.header.get("log", {}).get("metric", "L_det"))


def _page(title: str, curve: str, shown: Html, outcomes: Sequence[Outcome]) -> Html:
    head = page_head(f"{title} · dvar replay", _style("charts.css") + _style("report.css"), images=False)
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
    return files("dvar.laboratory").joinpath(name).read_text(encoding="utf-8")
