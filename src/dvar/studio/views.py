"""What the pages show of runs, as HTML: cards, charts, sample images, meters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from markupsafe import Markup

from dvar.config.training import BUNDLED_MODELS, FREE_FIELDS
from dvar.errors import DvarError
from dvar.html import svg_charts
from dvar.html.images import embed_image
from dvar.html.svg_charts import Scale
from dvar.html.templates import render
from dvar.runs import report_figures
from dvar.runs.generate import list_generated_images
from dvar.runs.run_folder import RunFolder
from dvar.stopping.prediction import StopPrediction, predict_stop
from dvar.studio.library import LibraryRun
from dvar.studio.new_run import Check, Estimate
from dvar.studio.scores import RunScores
from dvar.training.progress import format_duration

MAX_GENERATED = 24
STATES = {
    "queued": "waits for its turn",
    "starting": "loads the base model",
    "training": "is training",
    "paused": "is paused and can go on",
    "finished": "has finished",
    "failed": "ended without a result",
}
_RECENT = 50  # records whose pace is that of now


@dataclass(frozen=True)
class Number:
    """A number beside the charts: its name, its value, and a detail."""

    name: str
    value: str
    detail: str = ""


def show_library(runs: Sequence[LibraryRun]) -> str:
    """Return the cards of all runs."""
    return _render("library.html", cards=[_card(run) for run in runs])


def show_check(check: Check, images: Mapping[str, Path], estimate: Estimate | None, cap: int | None) -> str:
    """Return what preflight says of a new run, and what it will cost."""
    return _render("check.html", check=check, images=images, estimate=estimate, cap=cap, size=format_bytes)


def show_run(run: LibraryRun) -> str:
    """Return the head of a run: what it is doing, the sentence of its verdict, its numbers."""
    opened = run.opened
    prediction = predict(opened) if opened and run.state in ("training", "paused") else None
    return _render(
        "run.html",
        run=run,
        opened=opened,
        state=STATES[run.state],
        model=_name_model(opened) if opened else "",
        numbers=_list_numbers(run, opened, prediction) if opened else [],
        verdict=_read_verdict(opened) if opened else None,
    )


def show_charts(run: RunFolder) -> str:
    """Return the charts of a run: its losses, and the ratio that its rule compares with the threshold."""
    return _render("charts.html", opened=run, figures=report_figures, judged=bool(len(run.trace.steps)))


def show_samples(run: RunFolder, step: int, scores: RunScores | None) -> str:
    """Return the sample images of a step, with the two meters, beside the instance images."""
    return _render("samples.html", run=run, step=step, paths=run.samples[step], scores=scores)


def show_generated(run: RunFolder) -> str:
    """Return the images that were generated with the weights of a run, the newest first."""
    images = [image for image in list_generated_images(run) if image.result][-MAX_GENERATED:]
    return _render("generated.html", images=images[::-1])


def show_comparison(first: LibraryRun, second: LibraryRun) -> str:
    """Return two runs side by side: how they ended, the shapes of their L_det, their last samples."""
    pairs = [(run, opened) for run in (first, second) if (opened := run.opened)]
    return _render(
        "compare.html",
        pairs=[(run, opened, _last_samples(opened)) for run, opened in pairs],
        chart=_plot_relative_losses([opened for _, opened in pairs]),
        rows=_compare_rows([opened for _, opened in pairs]),
        missing=[run for run in (first, second) if not run.opened],
    )


def show_replay(title: str, figure: str, outcomes: Sequence[Any]) -> str:
    """Return a replayed log: its figure, which is an image of its own, and the sentence of each rule."""
    return _render("replayed.html", title=title, figure=quote(figure), outcomes=outcomes)


def show_message(text: str, kind: str = "note") -> str:
    """Return a message, line by line: a "note" or an "alert"."""
    return _render("message.html", lines=text.splitlines(), kind=kind)


def predict(run: RunFolder) -> StopPrediction | None:
    """Return when DVAR is likely to stop a run; None for another rule too."""
    if not run.takes_window:
        return None
    return predict_stop(run.trace.steps, run.ratios, run.config["window"], run.config["threshold"])


def format_bytes(count: int) -> str:
    """Return an amount of memory in GiB."""
    return f"{count / 2**30:.1f} GiB"


def _render(template: str, **context: Any) -> str:
    helpers = {"image": embed_image, "address": _address, "duration": format_duration}
    return render("dvar.studio", template, **helpers, **context)


def _address(run: LibraryRun) -> str:
    return f"run?name={quote(run.name, safe='')}"


def _card(run: LibraryRun) -> dict[str, Any]:
    """Return what the card of a run shows."""
    opened = run.opened
    verdict = _read_verdict(opened) if opened else None
    return {
        "run": run,
        "opened": opened,
        "state": STATES[run.state],
        "time": datetime.fromtimestamp(run.changed).strftime("%d %b %Y, %H:%M") if run.changed else "",
        "sentence": verdict.sentence if verdict and opened and len(opened.trace) else run.problem,
        "image": _find_portrait(run, opened),
        "chart": _plot_spark(opened) if opened and len(opened.trace.steps) > 1 else None,
    }


def _find_portrait(run: LibraryRun, opened: RunFolder | None) -> Path | None:
    """Return the image that stands for a run: its last sample, or an instance image."""
    if opened and opened.samples:
        return next(iter(_last_samples(opened)), None)
    return opened.references[0] if opened and opened.references else None


def _last_samples(run: RunFolder) -> tuple[Path, ...]:
    step = max(run.samples, default=0) if run.exported_step is None else run.exported_step
    return run.samples.get(step, ())


def _name_model(run: RunFolder) -> str:
    name = str(run.config["pretrained_model_name_or_path"])
    return BUNDLED_MODELS.get(name, Path(name).name)


def _read_verdict(run: RunFolder) -> Any:
    try:
        return run.verdict
    except DvarError:
        return None


def _list_numbers(run: LibraryRun, opened: RunFolder, prediction: StopPrediction | None) -> list[Number]:
    """Return the numbers of a run: where it is, when it is likely to stop, its best step."""
    cap = int(opened.config["max_train_steps"])
    numbers = [Number("step", str(opened.steps), f"of at most {cap}")]
    if run.state in ("training", "paused"):
        numbers.append(_describe_prediction(opened, prediction, cap))
    if opened.best:
        numbers.append(Number("best step so far", str(opened.best[0]), f"the lowest L_det, {opened.best[1]:.5g}"))
    seconds = sum(opened.seconds.values())
    if run.state == "training" and (pace := _recent_pace(opened)):
        left = format_duration(pace * (cap - opened.steps))
        numbers.append(Number("steps a second", f"{1 / pace:.3g}", f"{left} to the cap"))
    elif seconds:
        numbers.append(Number("time", format_duration(seconds), "training and measuring"))
    return numbers


def _describe_prediction(run: RunFolder, prediction: StopPrediction | None, cap: int) -> Number:
    name = "predicted stop"
    if prediction and prediction.low < cap:
        high = f"{prediction.high}" if prediction.high < cap else f"the cap, {cap}"
        return Number(name, f"{min(prediction.step, cap)}", f"four runs in five: {prediction.low} to {high}")
    if prediction:
        return Number(name, f"{cap}", "the cap, by the pace of the decline")
    if run.steps < run.ready_step:
        return Number(name, "not yet", f"not before step {run.ready_step}")
    return Number(name, "unknown", "the ratio does not fall steadily" if run.takes_window else "by the rule octave")


def _recent_pace(run: RunFolder) -> float | None:
    """Return the seconds of a step lately; None before the first update."""
    total = np.zeros(0)
    for kind in ("train", "probe", "other"):
        _, seconds = run.trace.metric(f"seconds.{kind}")
        total = seconds[-_RECENT:] if not total.size else total + seconds[-_RECENT:]
    return float(total.mean()) if total.size > 1 else None


def _plot_spark(run: RunFolder) -> Markup:
    x, y = Scale(0.0, max(run.steps, 1) * 1.03), Scale.around(run.trace.values)
    line = svg_charts.curve(x, y, run.trace.steps, run.trace.values, "signal")
    return svg_charts.spark([line], label="L_det by step")


def _plot_relative_losses(runs: Sequence[RunFolder]) -> Markup | None:
    """Return a chart of L_det of two runs, each divided by its first value."""
    curves = [(run, run.trace.values / run.trace.values[0]) for run in runs if len(run.trace.steps) > 1]
    if not curves:
        return None
    x, y = Scale(0.0, max(run.steps for run, _ in curves) * 1.03), Scale.around(*(values for _, values in curves))
    classes = ["signal", "second"]
    layers = [
        svg_charts.curve(x, y, run.trace.steps, values, classes[place]) for place, (run, values) in enumerate(curves)
    ]
    return svg_charts.panel(x, y, layers, label="L_det of both runs, relative to their first values", steps=True)


def _compare_rows(runs: Sequence[RunFolder]) -> list[tuple[str, list[str]]]:
    """Return how runs ended, and the settings that both have and in which they differ."""
    ends = [
        ("steps", [str(run.steps) for run in runs]),
        ("best step", [str(run.best[0]) if run.best else "" for run in runs]),
        ("time", [format_duration(sum(run.seconds.values())) for run in runs]),
    ]
    names = [name for name in runs[0].config if name not in {"versions", *FREE_FIELDS}] if runs else []
    shared = [name for name in names if all(name in run.config for run in runs)]
    texts = {name: [_format(run.config[name]) for run in runs] for name in shared}
    return ends + [(name, values) for name, values in texts.items() if len({*values}) > 1]


def _format(value: object) -> str:
    return "" if value is None else str(value)
