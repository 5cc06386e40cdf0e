"""The page on which two runs are compared."""

from __future__ import annotations

from typing import Any

import gradio as gr

from dvar.studio.library import find_run, list_runs
from dvar.studio.pages import QUIET, Studio, answer, heading
from dvar.studio.views import show_comparison


def add_compare_page(studio: Studio, page: gr.Blocks) -> None:
    """Add the comparison to its page."""
    heading("Compare", "Two runs side by side: where they differ, how their losses fell, what they generate.")
    with gr.Row():
        first = gr.Dropdown([], label="First run")
        second = gr.Dropdown([], label="Second run")
    view = gr.HTML()

    def load(request: gr.Request) -> list[Any]:
        names = [run.name for run in list_runs(studio.root)]
        chosen = [request.query_params.get(key) for key in ("first", "second")]
        values = [name if name in names else default for name, default in zip(chosen, (names * 2)[:2], strict=False)]
        values = [*values, None, None][:2]
        updates = [gr.update(choices=names, value=value) for value in values]
        return [*updates, compare(*values)]

    def compare(one_name: str | None, other_name: str | None) -> str:
        if not one_name or not other_name:
            return ""
        runs, refusal = answer(lambda: (find_run(studio.root, one_name), find_run(studio.root, other_name)))
        return show_comparison(*runs) if runs else refusal

    page.load(load, None, [first, second, view], **QUIET)
    for field in (first, second):
        field.input(compare, [first, second], view, **QUIET)
