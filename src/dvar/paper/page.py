"""The page of experiments in HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence

from dvar.html.templates import render
from dvar.paper.registry import Experiment
from dvar.paper.result import ExperimentResult, Plot, render_plot


def render_page(results: Sequence[tuple[Experiment, ExperimentResult]], facts: Sequence[str]) -> str:
    """Return one page with every result, which loads nothing and runs no script.

    Args:
        results: The experiments with their results, in order.
        facts: Paragraphs that open the page: what the results were made from.
    """
    return render("dvar.paper", "experiments.html", results=results, facts=facts, data_url=_data_url)


def _data_url(plot: Plot) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(render_plot(plot, 'svg')).decode()}"
