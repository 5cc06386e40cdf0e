"""A run, finished or not, as one page for a person: why it stopped, the curves, the pictures, how to use the result."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator, Mapping
from html import escape
from importlib.resources import files
from pathlib import Path

from dvar.config.training import BUNDLED_MODEL
from dvar.html.elements import Html, element, join, page_head
from dvar.runs import report_figures
from dvar.runs.run_folder import RunFolder
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import SETTLED
from dvar.training.loading_code import imports, loads


def write_report(run_dir: str | Path) -> Path:
    """Return the path of `report.html`, written into the run's folder.

    One file that loads nothing and runs no script; the same run gives the same bytes. Of an unfinished run it shows
    what there is.

    Raises: RefusedInput when the folder holds no run or a damaged one; TraceError when its trace is damaged.
    """
    run = RunFolder.open(run_dir)
    path = run.folder / "report.html"
    path.write_text("<!doctype html>\n" + _page(run) + "\n", encoding="utf-8", newline="\n")
    return path


def _page(run: RunFolder) -> Html:
    sheets = (files("dvar.html").joinpath(name) for name in ("charts.css", "style.css"))
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    head = page_head(f"{run.settings.subject} · dvar", style)
    sections = (_title, _outcome, _numbers, _losses, _ratio, _growth, _single_inputs, _use, _settings)
    return element("html", head, element("body", element("main", *(section(run) for section in sections))), lang="en")


def _title(run: RunFolder) -> Html:
    settings, count = run.settings, len(run.references)
    pictures = f"{count} {_plural(count, 'picture')}" if count else "pictures"
    name = settings.pretrained_model_name_or_path
    start = f", starting from “{settings.initializer_token}”" if settings.placeholder_token else ""
    model = "the bundled model" if name == BUNDLED_MODEL else name
    return element(
        "header",
        element("p", settings.title, class_="eyebrow"),
        element("h1", settings.subject),
        element(
            "p",
            f"{settings.learned} for {model}, learned from {pictures}{start}",
            class_="standfirst",
        ),
        report_figures.becoming(run),
    )


def _outcome(run: RunFolder) -> Html:
    said, _, because = run.verdict.sentence.partition(": ")
    verdict = element("p", element("b", f"{_capitalised(said)}:"), " ", _prose(because), class_="verdict")
    notes = element("ul", *(element("li", note) for note in _notes(run)), class_="notes")
    return element("section", verdict, None if run.result else _unfinished(run), notes, class_="outcome")


def _notes(run: RunFolder) -> Iterator[Html]:
    """What a person should know before believing the verdict."""
    verdict = run.verdict
    for diagnosis in verdict.diagnoses:
        yield join([element("b", f"{_capitalised(diagnosis.reason.value)}:"), f" {diagnosis.sentence}."])
    if verdict.reason is Reason.NON_FINITE and run.result:
        yield join([f"What was exported is what was learned by step {run.exported_step}, before the fault."])
    if verdict.reason is Reason.CAP:
        yield Html(
            "The cap ended this run, not the rule: its loss has not settled yet, or jitters too much to show it."
        )
    if verdict.stop and verdict.reason in SETTLED:
        if not verdict.diagnoses:
            yield Html("Nothing speaks against it: the loss has fallen, and by the end it hardly falls or rises.")
        early = math.floor(run.straight_line_step) - verdict.step
        compared = f"stopped {early} {_plural(early, 'step')} before that" if early > 0 else "came no earlier"
        straight = f"at step {math.floor(run.straight_line_step)}"
        line = f"Even a loss that falls in a straight line passes the threshold, {straight}."
        yield join([f"{line} This run {compared}."])


def _unfinished(run: RunFolder) -> Html:
    recorded = f"This run has not finished: {run.steps} of at most {run.config['max_train_steps']} steps are recorded."
    command = element("code", "--resume_from_checkpoint latest")
    return element("p", recorded, " If nothing is training it now, its command with ", command, " takes it up again.")


def _numbers(run: RunFolder) -> Html:
    steps = _fact(f"{run.steps}", _plural(run.steps, "step"), f"of at most {run.config['max_train_steps']}")
    return element("section", element("dl", steps, _time(run), _saved(run), _best(run), class_="numbers"))


def _time(run: RunFolder) -> Html | None:
    total = sum(run.seconds.values())
    if not total:
        return None
    shares = [f"{kind} {100 * spent / total:.0f} %" for kind, spent in run.seconds.items()]
    return _fact(_duration(total), "spent", " · ".join(shares))


def _saved(run: RunFolder) -> Html | None:
    saved = run.seconds_to_cap - sum(run.seconds.values())
    if not run.result or run.verdict.reason not in SETTLED or saved <= 0:
        return None
    cap = f"{run.config['max_train_steps']} steps without the probe: about {_duration(run.seconds_to_cap)}"
    return _fact(_duration(saved), "saved", cap)


def _best(run: RunFolder) -> Html | None:
    if run.best is None:
        return None
    step, value = run.best
    first = run.trace.values[0]
    gain = f", {100 * (1 - value / first):.2g} % below the first" if value < first else ""
    return _fact(f"{step}", "step of the lowest L_det", f"{value:.5g}{gain}")


def _fact(value: str, name: str, detail: str) -> Html:
    described = [element("dd", value, class_="value"), element("dd", detail, class_="detail")]
    return element("div", element("dt", _prose(name)), *described)


def _losses(run: RunFolder) -> Html:
    if not len(run.trace):
        return _section("The losses", element("p", "Nothing has been recorded yet."))
    caption = (
        "Both curves measure the same model. The training loss changes with the pictures, noise and timesteps of each "
        "step; L_det is measured on inputs drawn once, so what moves it is the model alone."
    )
    if run.verdict.stop and run.verdict.reason in SETTLED:
        caption += f" Shaded: the last {run.config['window']} steps, over which the stop was judged."
    return _section("The losses", _figure(report_figures.losses(run), caption + _lost(run)))


def _lost(run: RunFolder) -> str:
    lost = report_figures.lost_steps(run)
    if not lost:
        return ""
    named = ", ".join(f"{step}" for step in lost[:5]) + (" and others" if len(lost) > 5 else "")
    return f" A loss was not finite at {_plural(len(lost), 'step')} {named} (dotted lines)."


def _ratio(run: RunFolder) -> Html | None:
    if not len(run.trace.steps):
        return None
    window, threshold = run.config["window"], run.config["threshold"]
    caption = (
        f"The variance of L_det over the last {window} steps divided by that over the whole run; training stops "
        f"when this is below {100 * threshold:g} % and the loss no longer falls. Dotted: a loss that falls in a "
        f"straight line, which the rule would stop at about step {math.floor(run.straight_line_step)} with "
        "nothing settled. Shaded: warming up, without a ratio yet."
    )
    return _section("The stopping rule", _figure(report_figures.ratio(run), caption))


def _growth(run: RunFolder) -> Html | None:
    if not run.samples:
        return None
    word = run.settings.subject
    caption = "Each row starts from the same noise, so what changes along it is only what was learned."
    return _section(f"How {word} grew", _figure(report_figures.growth(run), caption))


def _single_inputs(run: RunFolder) -> Html | None:
    if not len(run.trace.steps):
        return None
    caption = (
        "L_det is the mean of these. Each has its own scale and, at its right, its change from the first step to the "
        "last; t is the input's timestep: the larger, the more noise."
    )
    return _section("Input by input", _figure(report_figures.single_inputs(run), caption))


def _use(run: RunFolder) -> Html | None:
    if not run.result:
        return None
    config = run.config
    folder, prompt = config["output_dir"], f"{run.settings.plain_prompt} on the beach"
    weights = run.result["weights"]
    bundled = config["pretrained_model_name_or_path"] == BUNDLED_MODEL
    model = "str(dvar.mini.path())" if bundled else _quoted(config["pretrained_model_name_or_path"])
    lines = [
        *["import dvar.mini"] * bundled,
        *imports(weights),
        "",
        f"pipeline = StableDiffusionPipeline.from_pretrained({model})",
        *loads(weights, folder),
        f'pipeline({_quoted(prompt)}).images[0].save("picture.png")',
    ]
    return _section(
        "How to use it",
        element("p", "From the command line:"),
        element("pre", element("code", f"dvar generate {shlex.quote(folder)} --prompt {shlex.quote(prompt)}")),
        element("p", "Or anywhere that diffusers runs:"),
        element("pre", element("code", "\n".join(lines))),
        _best_file(run),
    )


def _best_file(run: RunFolder) -> Html | None:
    result = run.result or {}
    kept = ", ".join(name for name in result["best_weights"] if name not in result["weights"])
    if not kept:
        return None
    return element("p", _prose("What was learned at the lowest L_det is kept as well: "), element("code", kept), ".")


def _settings(run: RunFolder) -> Html:
    settings = {name: value for name, value in run.config.items() if name != "versions"}
    return element("section", _table("Settings", settings), _table("Versions", run.config.get("versions", {})))


def _table(title: str, values: Mapping[str, object]) -> Html | None:
    if not values:
        return None
    rows = [element("tr", element("th", name, scope="row"), element("td", _written(values[name]))) for name in values]
    table = element("table", element("tbody", *rows), class_="settings")
    return element("details", element("summary", title), table)


def _section(title: str, *children: Html | None) -> Html:
    return element("section", element("h2", title), *children)


def _figure(content: Html | None, caption: str) -> Html:
    return element("figure", content, element("figcaption", _prose(caption)))


def _prose(text: str) -> Html:
    """The text with the fixed-batch loss set as the paper sets it, and numbers kept together with their per cent."""
    text = text.replace(" %", "\u00a0%")
    return Html(report_figures.L_DET.join(escape(part) for part in text.split("L_det")))


def _written(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _duration(seconds: float) -> str:
    """The time in its two largest units: "48 s", "3 min 12 s", "1 h 04 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole else f"{seconds:.1g} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
