"""The page of one run: live while it trains, and afterwards its steps, its images and its exports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from dvar.studio import commands, queue
from dvar.studio.library import LibraryRun, find_run
from dvar.studio.pages import QUIET, Studio, answer
from dvar.studio.scores import find_clip, read_scores
from dvar.studio.views import show_charts, show_generated, show_message, show_run, show_samples
from dvar.training.run_layout import checkpoint_name

T = TypeVar("T")
SECONDS = 2.0  # between two looks at the folder
MAX_IMAGES = 16


def add_run_page(studio: Studio, page: gr.Blocks) -> None:
    """Add the view of one run, which the address names, to its page."""
    name, seen = gr.State(""), gr.State(None)
    head = gr.HTML('<div class="dvar"><h1>Run</h1></div>')
    with gr.Row():
        stop = gr.Button("Stop now", variant="primary", visible=False)
        save = gr.Button("Save now", visible=False)
        go_on = gr.Button("Go on", variant="primary", visible=False)
        cancel = gr.Button("Take out of the queue", visible=False)
    message = gr.HTML()
    charts = gr.HTML()
    with gr.Column(visible=False) as steps:
        slider = gr.Slider(1, 2, 1, step=1, label="Recorded steps, from first to last", buttons=[])
        samples = gr.HTML()
        with gr.Row():
            measure = gr.Button("Measure likeness and obedience")
            take = gr.Button("Take this step", visible=False)
    with gr.Column(visible=False) as use:
        gr.HTML('<div class="dvar"><h2 class="part">Generate</h2></div>')
        prompt = gr.Textbox(label="Prompt", max_lines=2)
        with gr.Row():
            count = gr.Slider(1, MAX_IMAGES, 4, step=1, label="Images", buttons=[])
            seed = gr.Number(0, label="Seed of the first image", precision=0, minimum=0)
        generate = gr.Button("Generate", variant="primary")
        generated = gr.HTML()
        gr.HTML('<div class="dvar"><h2 class="part">Export</h2></div>')
        kind = gr.Radio([], label="Format")
        export = gr.Button("Make the file")
        file = gr.File(label="File to download", visible=False, interactive=False)
    timer = gr.Timer(SECONDS)
    buttons = [stop, save, go_on, cancel]
    parts = [seen, head, message, charts, *buttons, steps, slider, samples, measure, take, use, prompt, generated, kind]

    def open_page(request: gr.Request) -> list[Any]:
        title = request.query_params.get("name", "")
        run, refusal = answer(lambda: find_run(studio.root, title))
        if run is None:
            return [title, gr.skip(), gr.skip(), refusal, *(gr.skip() for _ in parts[3:])]
        return [title, *refresh(title, None, 1)]

    def refresh(title: str, before: Any, place: int) -> list[Any]:
        run, _ = answer(lambda: find_run(studio.root, title))
        if run is None:
            return [gr.skip()] * len(parts)
        queue.ensure_runner(studio.root)
        opened = run.opened
        recorded = sorted(opened.samples) if opened else []
        now = (run.state, run.changed, tuple(recorded), opened.exported_step if opened else None)
        if now == before:
            return [gr.skip()] * len(parts)
        follows = before is None or place >= len(before[2])
        place = len(recorded) if follows else min(place, len(recorded))
        finished = run.state == "finished" and opened is not None
        was_finished = before is not None and before[0] == "finished"
        formats = commands.list_formats(opened) if finished and opened else ()
        refusals: list[str] = []

        def draw(view: Callable[[], T], instead: T) -> T:
            """Return a view, or what takes its place where it is refused: the others are shown all the same."""
            page_part, refusal = answer(view)
            if page_part is None:
                refusals.append(refusal)
            return instead if page_part is None else page_part

        state = draw(lambda: show_run(run), "")
        curves = draw(lambda: show_charts(opened) if opened else "", "")
        step = draw(lambda: _view_step(run, recorded, place), NO_STEP)
        words = draw(lambda: f"{opened.settings.plain_prompt} on the beach" if opened else "", "")
        images = draw(lambda: show_generated(opened) if finished and opened else "", "")
        return [
            now,
            state,
            "".join(dict.fromkeys(refusals)) or (gr.skip() if before is not None and before[0] == run.state else ""),
            curves,
            *(gr.update(visible=run.state in states) for states in BUTTON_STATES),
            gr.update(visible=bool(recorded)),
            gr.update(maximum=max(2, len(recorded)), value=max(1, place), visible=len(recorded) > 1),
            *step,
            gr.update(visible=finished),
            gr.skip() if was_finished or not opened else words,
            images,
            gr.update(choices=list(formats), value=formats[0] if formats else None),
        ]

    def choose_step(title: str, place: int) -> list[Any]:
        run, _ = answer(lambda: find_run(studio.root, title))
        if run is None or not run.opened:
            return [gr.skip()] * 3
        return _view_step(run, sorted(run.opened.samples), place)

    def act(title: str, action: Any, done: str) -> str:
        """Return what came of an action on the run."""

        def do() -> Any:
            return action(find_run(studio.root, title))

        outcome, refusal = answer(do)
        if outcome is False:
            return show_message("the run has ended already")
        return refusal or show_message(done)

    def press_go_on(title: str) -> str:
        text = act(title, queue.enqueue_resumption, "the run is in the queue and goes on from its last checkpoint")
        queue.ensure_runner(studio.root)
        return text

    def press_take(title: str, place: int) -> str:
        def take_place(run: LibraryRun) -> None:
            recorded = sorted(run.opened.samples) if run.opened else []
            commands.take_step(run, recorded[int(place) - 1])

        return act(title, take_place, "the weights of this step are the result of the run")

    def press_generate(title: str, text: str, number: int, first: float) -> tuple[str, Any]:
        def run_it(run: LibraryRun) -> str:
            commands.generate(run, text, min(int(number), MAX_IMAGES), int(first or 0))
            return show_generated(run.opened) if run.opened else ""

        html, refusal = answer(lambda: run_it(find_run(studio.root, title)))
        return refusal, html if html is not None else gr.skip()

    def press_export(title: str, wanted_format: str) -> tuple[str, Any]:
        path, refusal = answer(lambda: commands.export(find_run(studio.root, title), wanted_format))
        return refusal, gr.update(value=str(path) if path else None, visible=path is not None)

    look = {"fn": refresh, "inputs": [name, seen, slider], "outputs": parts, **QUIET}
    page.load(open_page, None, [name, *parts], **QUIET)
    timer.tick(**look)
    slider.change(choose_step, [name, slider], [samples, measure, take], trigger_mode="always_last", **QUIET)
    saved = "the run saves a checkpoint after this step, and goes on"
    stopped = "the run saves and stops after this step"
    stop.click(lambda title: act(title, queue.stop, stopped), name, message, **QUIET).then(**look)
    save.click(lambda title: act(title, queue.request_checkpoint, saved), name, message, **QUIET)
    go_on.click(press_go_on, name, message, **QUIET).then(**look)
    cancel.click(lambda title: act(title, queue.cancel, "the run is out of the queue"), name, message, **QUIET).then(
        **look
    )
    measured = "likeness and obedience are measured"
    measure.click(lambda title: act(title, commands.measure, measured), name, message, api_visibility="private").then(
        choose_step, [name, slider], [samples, measure, take], **QUIET
    )
    take.click(press_take, [name, slider], message, api_visibility="private").then(**look)
    generate.click(press_generate, [name, prompt, count, seed], [message, generated], api_visibility="private")
    export.click(lambda: gr.update(value=None, visible=False), None, file, **QUIET).then(
        press_export, [name, kind], [message, file], api_visibility="private"
    )


BUTTON_STATES = (("training",), ("training",), ("paused",), ("queued",))
"""The states in which the buttons stop, save, go on and cancel are there."""
NO_STEP: list[Any] = ["", gr.update(visible=False), gr.update(visible=False)]
"""The view of a step where there is none."""


def _view_step(run: LibraryRun, recorded: list[int], place: int) -> list[Any]:
    """Return the samples of the step at ``place``, counted from 1, and the buttons to measure and to take it."""
    opened = run.opened
    if not opened or not recorded:
        return NO_STEP
    step = recorded[min(max(int(place), 1), len(recorded)) - 1]
    scores, clip = read_scores(opened), find_clip(opened.settings)
    html = show_samples(opened, step, scores)
    missing = scores is None or step not in scores.steps
    if not clip:
        html += show_message(
            "likeness and obedience need a CLIP, and this run names none: --clip_model with best_by clip"
        )
    can_take = (
        run.state == "finished" and step != opened.exported_step and (run.folder / checkpoint_name(step)).is_dir()
    )
    return [html, gr.update(visible=missing and bool(clip)), gr.update(visible=can_take)]
