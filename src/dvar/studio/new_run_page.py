"""The page on which a run is prepared: images, captions, model, method, and what preflight says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from dvar.config.methods import TextualInversionConfig
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL
from dvar.errors import DvarError
from dvar.html.images import embed_image
from dvar.studio.draft import Draft
from dvar.studio.new_run import (
    NUMBERS,
    Form,
    build_settings,
    check_new_run,
    estimate,
    preset_numbers,
    start,
)
from dvar.studio.pages import QUIET, Studio, answer, heading, uploaded_files
from dvar.studio.queue import ensure_runner
from dvar.studio.views import show_check, show_message
from dvar.training.methods.registry import METHODS

LABELS = {
    "max_train_steps": "Cap, in steps",
    "learning_rate": "Learning rate",
    "train_batch_size": "Images in a batch",
    "resolution": "Resolution, in pixels",
    "window": "Window of the rule, in steps",
    "threshold": "Threshold of the rule",
    "seed": "Seed",
}
TEXTS = ("name", "method", "model", "word", "noun", "validation_prompt")
DEFAULTS = {
    "name": "my-run",
    "method": TextualInversionConfig.method,
    "model": BUNDLED_MODEL,
    "word": "<thing>",
    "noun": "",
    "validation_prompt": "",
}
OPEN = "(address) => { if (address) window.location.assign(address) }"
"""Opens the page of the run that was started."""


def add_new_run_page(studio: Studio, page: gr.Blocks) -> None:
    """Add the form of a new run to its page."""
    draft = Draft(studio.root)
    heading("New run", "Three to five images of one thing are enough. What you enter here survives a reload.")
    version = gr.State(0)
    upload = gr.File(label="Images", file_count="multiple", file_types=["image"], height=150)
    captions = gr.Column()
    fill = gr.Button("Fill captions from templates")
    with gr.Row():
        name = gr.Textbox(label="Name of the run", info="Names its folder.", max_lines=1)
        word = gr.Textbox(label="New word", info="Stands for the concept in prompts.", max_lines=1)
        noun = gr.Textbox(label="Class noun", info="What it is, in one word: mug.", max_lines=1)
    with gr.Row():
        choices = [(entry.config_type.title, method) for method, entry in METHODS.items()]
        method = gr.Radio(choices, label="Method", info="What is learned from the images.")
        model = gr.Dropdown(
            list(studio.models), label="Base model", info="Bundled, or a hub id: owner/name.", allow_custom_value=True
        )
    validation_prompt = gr.Textbox(
        label="Prompt of the sample images", info="With the new word; a plain one by default.", max_lines=1
    )
    with gr.Accordion("Numbers of the preset", open=False), gr.Row():
        numbers = [gr.Number(label=label, min_width=140) for label in LABELS.values()]
    result = gr.HTML()
    with gr.Row():
        check_button = gr.Button("Check")
        start_button = gr.Button("Start", variant="primary")
    address = gr.Textbox(visible="hidden")
    fields: list[Any] = [name, method, model, word, noun, validation_prompt, *numbers]

    def load(seen: int) -> list[Any]:
        form = {**DEFAULTS, **draft.read_form()}
        try:
            presets = preset_numbers(str(form["method"]), str(form["model"]), studio.models)
        except DvarError:
            presets = preset_numbers(DEFAULTS["method"], DEFAULTS["model"], studio.models)
        return [seen + 1, *(form[key] for key in TEXTS), *(form.get(key, presets[key]) for key in NUMBERS)]

    def use_preset(method: str, model: str) -> list[Any]:
        values, _ = answer(lambda: preset_numbers(method, model, studio.models))
        return [values[key] for key in NUMBERS] if values else [gr.skip()] * len(NUMBERS)

    def remember(*values: Any) -> None:
        draft.write_form(dict(zip((*TEXTS, *NUMBERS), values, strict=True)))

    def add(paths: Any, seen: int) -> tuple[None, int, str]:
        problems, refusal = answer(lambda: draft.add(uploaded_files(paths)))
        return None, seen + 1, refusal or (show_message("\n".join(problems), "alert") if problems else "")

    def fill_captions(seen: int, *values: Any) -> tuple[int, Any]:
        def write() -> None:
            form = _read_form(values, studio.models)
            settings = build_settings(form, studio.root, studio.models, draft.images_folder)
            draft.fill_captions(configure(settings, METHODS.find(form.method).config_type).caption_templates)

        _, refusal = answer(write)
        return seen + 1, refusal or gr.skip()  # a check may have answered meanwhile

    def check(*values: Any) -> str:
        def look() -> str:
            answered, config = check_new_run(_read_form(values, studio.models), studio.root, studio.models)
            cost = estimate(config, studio.root) if config else None
            images = {path.name: path for path in draft.images}
            return show_check(answered, images, cost, config.max_train_steps if config else None)

        html, refusal = answer(look)
        return html or refusal

    def begin(*values: Any) -> tuple[str, str]:
        run, refusal = answer(lambda: start(_read_form(values, studio.models), studio.root, studio.models))
        if run is None:
            return refusal, ""
        ensure_runner(studio.root)
        return show_message(f"{run} is in the queue"), f"run?name={quote(run, safe='')}"

    def show_captions(seen: int) -> None:
        for path in draft.images:
            _add_caption(draft, path, version)

    with captions:
        gr.render(inputs=version, triggers=[version.change], show_progress="hidden")(show_captions)
    page.load(load, version, [version, *fields], **QUIET)
    upload.upload(add, [upload, version], [upload, version, result], **QUIET).then(check, fields, result, **QUIET)
    fill.click(fill_captions, [version, *fields], [version, result], **QUIET)
    for field in (method, model):
        field.input(use_preset, [method, model], numbers, **QUIET)
    gr.on([field.change for field in fields], remember, fields, trigger_mode="always_last", **QUIET)
    check_button.click(check, fields, result, api_visibility="private")
    start_button.click(begin, fields, [result, address], api_visibility="private").then(
        None, address, None, js=OPEN, api_visibility="private"
    )


def _add_caption(draft: Draft, path: Path, version: gr.State) -> None:
    """Add the row of an image: the image, its caption, and a button that removes both."""
    with gr.Row(elem_classes="caption", equal_height=True):
        gr.HTML(f'<div class="dvar">{embed_image(path, path.name)}</div>', scale=0, min_width=72)
        caption = gr.Textbox(
            draft.caption(path),
            label=f"Caption of {path.name}",
            placeholder="from templates",
            scale=8,
            interactive=True,
        )
        remove = gr.Button(f"Remove {path.name}", size="sm", scale=1, min_width=120)

    def write(text: str) -> None:
        draft.write_caption(path.name, text)

    def drop(seen: int) -> int:
        draft.remove_image(path.name)
        return seen + 1

    gr.on([caption.change, caption.blur], write, caption, trigger_mode="always_last", **QUIET)
    remove.click(drop, version, version, **QUIET)


def _read_form(values: Any, models: Mapping[str, str]) -> Form:
    """Return the form from the values of its fields; of its numbers, those that are not the preset's."""
    texts = [str(value or "").strip() for value in values[: len(TEXTS)]]
    name, method, model, word, noun, prompt = texts
    presets = preset_numbers(method, model, models)
    entered = dict(zip(NUMBERS, values[len(TEXTS) :], strict=True))
    numbers = {
        key: type(presets[key])(value) for key, value in entered.items() if value is not None and value != presets[key]
    }
    return Form(name, method, model, word, noun, prompt, numbers)
