"""The figures of a run's page: the losses, the ratio, the single inputs, the pictures over training."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dvar.html import svg_charts
from dvar.html.elements import Html, element, join
from dvar.html.svg_charts import Scale
from dvar.runs.run_folder import Floats, RunFolder
from dvar.stopping.rules import SETTLED

PIXEL_ART = 128  # pictures up to this side are shown pixel by pixel, larger ones are shrunk and smoothed
SHRUNK = 224
STEPS_SHOWN = 6
ROWS_SHOWN = 8
LOST_SHOWN = 20
L_DET = join([element("i", "L"), element("sub", "det")])


def losses(run: RunFolder) -> Html:
    """Return the training loss and, under it on the same steps, L_det; the window and the stop are marked on both."""
    x, (noisy_steps, noisy) = _across(run), run.trace.metric("train_loss")
    above, below = Scale.around(noisy), Scale.around(run.trace.values, room=0.16)
    inputs = f"the same {run.trace.samples.shape[-1]} held inputs every time" if len(run.trace.steps) else "held inputs"
    return element(
        "div",
        _heading("Training loss", "fresh pictures, noise and timesteps at every step"),
        _panel(x, above, [*_marks(run, x), svg_charts.curve(x, above, noisy_steps, noisy, "noise")], "Training loss"),
        _heading(L_DET, inputs),
        _panel(x, below, [*_marks(run, x, "stop"), _fixed_loss(run, x, below)], "L_det", last=True),
        class_="plot",
    )


def ratio(run: RunFolder) -> Html:
    """Return the ratio of the two variances over the steps against the threshold and against a straight line's."""
    x, window, threshold = _across(run), run.config["window"], run.config["threshold"]
    values = run.ratios
    reached = values[np.isfinite(values) & (values > 0)]
    y = Scale(min([threshold, *reached]) / 1.4, max([1.0, *reached]) * 1.15, log=True)
    straight = np.arange(window, x.high)
    layers = [
        svg_charts.band(x, 0, window, "warming"),
        *_stop(run, x, "stop"),
        svg_charts.curve(x, y, straight, (window / np.maximum(straight, 1)) ** 2, "null"),
        svg_charts.level(y, threshold, "threshold", f"threshold {100 * threshold:g} %"),
        svg_charts.curve(x, y, run.trace.steps, np.maximum(values, y.low), "signal"),
    ]
    heading = _heading("Recent variance ÷ whole variance", join(["of ", L_DET, ", on a logarithmic scale"]))
    return element("div", heading, _panel(x, y, layers, "Ratio of the variances", last=True, tall=True), class_="plot")


def single_inputs(run: RunFolder) -> Html | None:
    """Return one small curve for each held input, ordered by timestep, each on its own scale; None without records."""
    samples = run.trace.samples
    if not samples.size:
        return None
    timesteps = run.trace.header.get("timesteps") or [None] * samples.shape[1]
    order = sorted(range(samples.shape[1]), key=lambda index: (timesteps[index] or 0, index))
    return element("div", *(_single(run, samples[:, index], timesteps[index]) for index in order), class_="sparks")


def growth(run: RunFolder) -> Html | None:
    """Return the sample pictures, a row for each prompt and a column for each of some steps, beside the references."""
    if not run.samples:
        return None
    steps = _spread(sorted(run.samples), STEPS_SHOWN)
    rows = range(min(ROWS_SHOWN, max(len(pictures) for pictures in run.samples.values())))
    head = element("tr", *(element("th", f"step {step}", scope="col") for step in steps))
    body = [line for row in rows for line in _row(run, row, steps)]
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", element("div", table), _references(run), class_="growth")


def becoming(run: RunFolder) -> Html | None:
    """Return a few references and, beside them, what the newest samples show; None when there is neither."""
    newest = max(run.samples, default=0)
    final = run.samples.get(newest if run.exported_step is None else run.exported_step, ())
    strips = [("What training saw", run.references), (f"What {run.settings.subject} draws now", final)]
    found = [_strip(title, pictures[:3]) for title, pictures in strips if pictures]
    return element("div", *found, class_="becoming") if found else None


def picture(path: Path, says: str) -> Html:
    """Return a picture as part of the page; a frame in its place when the file cannot be read."""
    try:
        with Image.open(path) as opened:
            shown = opened.convert("RGB")
    except OSError:
        return element("span", class_="none", title=f"{path.name} cannot be read")
    pixels, written = max(shown.size) <= PIXEL_ART, io.BytesIO()
    if not pixels:
        shown.thumbnail((SHRUNK, SHRUNK), Image.Resampling.LANCZOS)
    kind = "png" if pixels else "jpeg"
    shown.save(written, kind, **({"optimize": True} if pixels else {"quality": 82}))
    source = f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode()}"
    return element("img", src=source, alt=says, class_="pixels" if pixels else None)


def lost_steps(run: RunFolder) -> list[int]:
    """Return the steps at which a recorded loss was not finite."""
    noisy_steps, noisy = run.trace.metric("train_loss")
    lost = np.concatenate([noisy_steps[~np.isfinite(noisy)], run.trace.steps[~np.isfinite(run.trace.values)]])
    return [int(step) for step in np.unique(lost)]


def _across(run: RunFolder) -> Scale:
    return Scale(0.0, max(run.steps, 1) * 1.03)


def _heading(name: str, says: str) -> Html:
    return element("h3", name, " ", element("span", says, class_="soft"))


def _panel(x: Scale, y: Scale, layers: Sequence[Html], says: str, *, last: bool = False, tall: bool = False) -> Html:
    return svg_charts.panel(x, y, layers, label=says, steps=last, tall=tall)


def _marks(run: RunFolder, x: Scale, name: str | None = None) -> list[Html]:
    """The window behind the verdict, the steps whose loss was lost and the stop."""
    lost = [svg_charts.upright(x, step, "lost") for step in lost_steps(run)[:LOST_SHOWN]]
    judged = run.verdict.stop and run.verdict.reason in SETTLED
    first, last = run.verdict.step - run.config["window"], run.verdict.step
    return [*[svg_charts.band(x, first, last, "window")] * judged, *lost, *_stop(run, x, name)]


def _stop(run: RunFolder, x: Scale, name: str | None) -> list[Html]:
    step = run.verdict.step
    return [svg_charts.upright(x, step, "stop", f"{name} {step}" if name else None)] if run.verdict.stop else []


def _fixed_loss(run: RunFolder, x: Scale, y: Scale) -> Html:
    line = svg_charts.curve(x, y, run.trace.steps, run.trace.values, "signal")
    return join([line, svg_charts.dot(x, y, *run.best, "best", f"lowest {run.best[0]}")]) if run.best else line


def _single(run: RunFolder, values: Floats, timestep: int | None) -> Html:
    x, y = _across(run), Scale.around(values)
    finite = values[np.isfinite(values)]
    change = f"{100 * (finite[-1] / finite[0] - 1):+.2g} %".replace("-", "−") if finite.size and finite[0] else ""
    name = "unknown timestep" if timestep is None else f"t = {timestep}"
    line = svg_charts.curve(x, y, run.trace.steps, values, "signal")
    title = element("p", element("span", name), element("span", change, class_="soft"))
    return element("div", title, svg_charts.spark([line], label=f"Loss at {name} by step"))


def _row(run: RunFolder, row: int, steps: Sequence[int]) -> Iterable[Html]:
    prompt = _prompt(run, row)
    if row == 0 or prompt != _prompt(run, row - 1):
        yield element("tr", element("th", prompt, colspan=len(steps), scope="rowgroup"))
    yield element("tr", *(element("td", _cell(run.samples[step], row, f"{prompt}, step {step}")) for step in steps))


def _cell(pictures: Sequence[Path], row: int, says: str) -> Html:
    return picture(pictures[row], says) if row < len(pictures) else element("span", class_="none")


def _prompt(run: RunFolder, row: int) -> str:
    return str(run.prompts[row]["prompt"]) if row < len(run.prompts) else "samples"


def _references(run: RunFolder) -> Html | None:
    if not run.references:
        return None
    pictures = [picture(path, "reference") for path in run.references[:5]]
    return element("aside", element("p", "references"), element("div", *pictures, class_="strip"))


def _strip(title: str, pictures: Sequence[Path]) -> Html:
    shown = [picture(path, title) for path in pictures]
    return element("figure", element("figcaption", title), element("div", *shown, class_="strip"))


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """`count` of the steps at most: the first, the last and some evenly between."""
    if len(steps) <= count:
        return list(steps)
    return [steps[int(at)] for at in np.rint(np.linspace(0, len(steps) - 1, count))]
