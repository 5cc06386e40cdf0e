"""The page on which the log of another program is replayed."""

from __future__ import annotations

import warnings
from typing import Any

import gradio as gr

from dvar.errors import RefusedInput
from dvar.logs.reader import read_log
from dvar.runs.config import ALL_RULES, ReplayConfig, problems
from dvar.runs.replay import replay_rules
from dvar.runs.replay_figure import plot_replay
from dvar.studio.pages import QUIET, Studio, answer, heading, uploaded_files
from dvar.studio.views import show_message, show_replay


def add_replay_page(studio: Studio, page: gr.Blocks) -> None:
    """Add the replay of a log to its page."""
    heading(
        "Replay a log", "When would each rule have stopped? Drop a trace, CSV, JSON lines or another trainer's log."
    )
    log = gr.File(label="Log", file_count="single", height=150)
    with gr.Row():
        metric = gr.Textbox(label="Curve", info="The loss on fixed inputs by default.", max_lines=1)
        window = gr.Number(ReplayConfig.window, label="Window, in steps", precision=0)
        threshold = gr.Number(ReplayConfig.threshold, label="Threshold")
    again = gr.Button("Replay", variant="primary")
    view = gr.HTML()

    def replay(path: Any, curve: str, steps: float, share: float) -> str:
        html, refusal = answer(lambda: _replay(path, curve, steps, share))
        return html or refusal

    inputs = [log, metric, window, threshold]
    log.upload(replay, inputs, view, **QUIET)
    again.click(replay, inputs, view, **QUIET)


def _replay(path: Any, curve: str, window: float, threshold: float) -> str:
    """Return the replay of an uploaded log, with what was warned of.

    Raises:
        DvarError: As `read_log` and `replay_rules`.
    """
    files = uploaded_files(path)
    if not files:
        raise RefusedInput(["the log is missing: drop one"])
    config = ReplayConfig(rule=(ALL_RULES,), window=int(window or 0), threshold=float(threshold or 0))
    if wrong := problems(config):
        raise RefusedInput(wrong)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = read_log(files[0], curve.strip() or None)
        outcomes = replay_rules(trace, config)
    figure = plot_replay(trace, outcomes, config.window, config.threshold)
    remarks = "\n".join(dict.fromkeys(str(item.message) for item in caught))
    return (show_message(remarks) if remarks else "") + show_replay(files[0].name, figure, outcomes)
