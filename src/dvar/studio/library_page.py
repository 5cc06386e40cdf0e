"""The page with all runs of the library."""

from __future__ import annotations

import gradio as gr

from dvar.studio.library import list_runs
from dvar.studio.pages import QUIET, Studio, heading
from dvar.studio.queue import ensure_runner
from dvar.studio.views import show_library

SECONDS = 3.0  # between two looks at the folder


def add_library_page(studio: Studio, page: gr.Blocks) -> None:
    """Add the library to its page."""
    heading("Runs", "Every run in this folder, whoever started it.")
    cards = gr.HTML()
    timer = gr.Timer(SECONDS)

    def refresh() -> str:
        ensure_runner(studio.root)
        return show_library(list_runs(studio.root))

    page.load(refresh, outputs=cards, **QUIET)
    timer.tick(refresh, outputs=cards, **QUIET)
