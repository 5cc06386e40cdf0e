"""The figure of docs/concepts/why-the-loss-hides-it.md: ``python docs/build/held_loss.py`` plots a recorded run."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib

from dvar.analysis.strategies import Strategy, evaluate_strategy
from dvar.config.presets import preset_settings
from dvar.paper.style import INK, NOISE, SIGNAL, STYLE, axes, mark
from dvar.recordings.archive_file import read_traces
from dvar.stopping.rules import Dvar

DOCS = Path(__file__).parents[1]
FIGURE = DOCS / "concepts" / "held-loss.svg"
METHOD = "dreambooth-lora"


def plot_run() -> str:
    """Return the SVG of the first recorded run of the method, by name: both losses, and the likeness of its images."""
    run = min((run for run in read_traces(DOCS / "traces.npz") if run.method == METHOD), key=lambda run: run.name)
    settings = preset_settings("mini", METHOD)
    rule = Dvar(settings["window"], settings["threshold"])
    stop = evaluate_strategy(Strategy("DVAR", rule), run).stop
    with matplotlib.rc_context(STYLE):
        figure, panels = axes(3, width=7.5, height=1.4, sharex=True)
        noisy, held, likeness = panels[:, 0]
        noisy.plot(*run.trace.metric("train_loss"), color=NOISE, linewidth=0.7)
        noisy.set_ylabel("training loss")
        steps, losses = run.series("eval")
        held.plot(steps, losses.mean(axis=1), color=SIGNAL, linewidth=1.4)
        held.set_ylabel("held loss")
        steps, scores = run.scores("train", "clip_image")
        likeness.plot(steps, scores.mean(axis=1), "o-", color=INK, markersize=2.5, linewidth=1)
        likeness.set_ylabel("likeness")
        likeness.set_xlabel("step")
        for panel in panels[:, 0]:
            mark(panel, stop, f"stop, {stop}" if panel is noisy else "", dashes="--")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    FIGURE.write_text(plot_run(), encoding="utf-8", newline="\n")
    print(FIGURE)
