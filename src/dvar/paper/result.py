"""Results of experiments as values, and their files: data as JSON and CSV, figures as SVG and PNG."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dvar.analysis.stop_quality import MIN_CONCEPTS, ORACLE, MeanInterval
from dvar.config.training import BUNDLED_MODELS
from dvar.html.tables import Column, cells
from dvar.paper.style import DOTS, STYLE
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import RecordedRun
from dvar.training.methods.registry import METHODS

T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """A table: the text of its cells, and the numbers behind it.

    Args:
        name: Its part of the file name.
        caption: What it shows, on what.
        columns: Titles of the columns.
        rows: Text of the cells; a row of one cell is a heading.
        data: The numbers of each row, by name.
        bold: The cells in bold, as (row, column).
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: tuple[Mapping[str, Any], ...]
    bold: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure, its caption, and the numbers behind it."""

    name: str
    caption: str
    figure: Figure
    data: Any = None


@dataclass(frozen=True)
class ExperimentResult:
    """The paragraphs, tables and figures of an experiment; or, in ``missing``, why there are none.

    Args:
        summary: Lines that head the page of results.
    """

    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    missing: str = ""
    summary: tuple[str, ...] = ()


@dataclass(frozen=True)
class Provenance:
    """The facts that every caption must state: base model, concepts, seeds, how images were scored, and what deviates.

    Args:
        models: Base models.
        concepts: Names of the concepts.
        fewer: Methods that were recorded on some of these concepts only, each with their number.
        seeds: Seeds of the runs.
        pairing: What an image is compared with.
        images: Images of each kind at a scored step.
        scored: Median number of scored steps.
        sampling_steps: Steps in which an image is generated.
        share: Length of the training, as a share of the full length.
        halves: What the two halves of the images are used for.
    """

    models: tuple[str, ...]
    concepts: tuple[str, ...]
    fewer: tuple[tuple[str, int], ...]
    seeds: tuple[int, ...]
    pairing: str
    images: tuple[int, ...]
    scored: int
    sampling_steps: int
    share: float = 1.0
    halves: str = "the even half chooses, the odd half is reported"

    @classmethod
    def of(cls, runs: Sequence[RecordedRun]) -> Provenance:
        """Return the provenance of what is made from ``runs``."""
        header = runs[0].header
        concepts = tuple(sorted({run.concept for run in runs}))
        counts = {run.method: len({other.concept for other in runs if other.method == run.method}) for run in runs}
        return cls(
            models=tuple(sorted({str(run.config.get("pretrained_model_name_or_path", "?")) for run in runs})),
            concepts=concepts,
            fewer=tuple((method, count) for method, count in counts.items() if count < len(concepts)),
            seeds=tuple(sorted({run.seed for run in runs})),
            pairing=str(header.get("pairing", "in an unknown way")),
            images=tuple(sorted({run.image_count for run in runs})),
            scored=int(np.median([len(run.scored_steps) for run in runs])),
            sampling_steps=int(header.get("sampling_steps", 0)),
            share=float(header.get("share", 1.0)),
        )

    def __str__(self) -> str:
        model = ", ".join(BUNDLED_MODELS.get(name, name) for name in self.models)
        images = " or ".join(map(str, self.images))
        fewer = ", ".join(f"{count} of {method_title(method)}" for method, count in self.fewer)
        concepts = f"{len(self.concepts)} ({fewer})" if fewer else f"{len(self.concepts)}"
        length = (
            "" if self.share == 1 else f"Trained to {100 * self.share:g} % of the full length, Baseline's cap too. "
        )
        return (
            f"Base model: {model}. Concepts: {concepts}; seeds: {len(self.seeds)}. {length}"
            f"CLIP similarity paired {self.pairing}; {images} images of each kind at {self.scored} steps, "
            f"{self.sampling_steps} sampling steps; {self.halves}."
        )


def build_table(
    name: str,
    caption: str,
    columns: Sequence[Column[T]],
    rows: Sequence[T],
    *,
    data: Iterable[Mapping[str, Any]],
    heading: Callable[[T], str] | None = None,
    bold: Collection[tuple[int, int]] = (),
) -> Table:
    """Return the table that ``columns`` describe, with one line for each of ``rows``.

    Args:
        name: Its part of the file name.
        caption: What it shows, on what.
        columns: Descriptions of the columns.
        rows: What the lines are about.
        data: The numbers that are saved, by name.
        heading: From a row to the heading of its group; a heading is a line of its own above the group.
        bold: The cells in bold, as (row, column), headings not counted.
    """
    lines, strong, group = list[tuple[str, ...]](), set[tuple[int, int]](), None
    for index, (row, texts) in enumerate(zip(rows, cells(columns, rows), strict=True)):
        if heading and heading(row) != group:
            group = heading(row)
            lines.append((group,))
        strong |= {(len(lines), column) for place, column in bold if place == index}
        lines.append(tuple(texts))
    return Table(name, caption, tuple(column.title for column in columns), tuple(lines), tuple(data), frozenset(strong))


def method_title(method: str) -> str:
    """Return a method's name for people."""
    return METHODS[method].title if method in METHODS else method


def compare_with_paper(difference: MeanInterval, claim: str, opposite: str, detail: str) -> str:
    """Return the sentence that a pattern of the paper is found here, that its opposite is, or that neither can be seen.

    Args:
        difference: What is above 0 where the pattern is found, with an interval from resampling concepts.
        claim: The pattern, as a clause.
        opposite: The clause for a difference below 0.
        detail: The numbers behind it.
    """
    if difference.concepts < MIN_CONCEPTS:
        concepts = f"{difference.concepts} concept{'s' * (difference.concepts != 1)}"
        clause = claim if difference.mean > 0 else opposite
        return f"On {concepts}, too few to compare with the paper, {clause} ({detail})."
    if difference.low > 0:
        return f"As in the paper, {claim} ({detail})."
    if difference.high < 0:
        return f"Unlike in the paper, {opposite} ({detail})."
    return f"Whether, as in the paper, {claim} cannot be seen ({detail})."


def describe_tuning(archive: RecordingArchive) -> str:
    """Return how settings are chosen, for captions."""
    where = "on the tuning concepts" if archive.has_tuning_runs else "for each concept on all others"
    return (
        f"Settings that were tuned keep at least {100 * ORACLE:.0f} % of the gain over the untouched model at the "
        f"least cost, {where}, from at most 100 points each; the paper's keep {100 * ORACLE:.0f} % of the maximum "
        "score in the fewest steps, which asks for less."
    )


def format_estimate(estimate: MeanInterval, digits: int = 2) -> str:
    """Return a mean with its interval, where there is one."""
    if not math.isfinite(estimate.low):
        return format_number(estimate.mean, digits)
    mean, low, high = (format_number(value, digits) for value in (estimate.mean, estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def format_number(value: float, digits: int = 3) -> str:
    """Return a number for a table; a dash where it is not finite."""
    return "–" if not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def format_mean_sd(values: Iterable[float], digits: int = 3) -> str:
    """Return mean ± standard deviation (ddof 0) of the finite values; the value alone where there is only one."""
    finite = np.array([value for value in values if math.isfinite(value)])
    if finite.size < 2:
        return format_number(float(finite[0]), digits) if finite.size else "–"
    return f"{format_number(float(finite.mean()), digits)} ± {format_number(float(finite.std()), digits)}"


def format_percent(share: float) -> str:
    """Return a share as whole percent."""
    return f"{100 * share:.0f} %"


def save_result(name: str, title: str, result: ExperimentResult, folder: Path) -> list[Path]:
    """Write a result under ``name`` and return the paths: one JSON, a CSV for each table, an SVG and a PNG a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json"]
    content = {
        "name": name,
        "title": title,
        "says": result.paragraphs,
        "missing": result.missing,
        **({"summary": result.summary} if result.summary else {}),
        "tables": [
            {
                "name": table.name,
                "caption": table.caption,
                "rows": table.data,
                "shown": {"columns": table.columns, "cells": table.rows, "bold": sorted(table.bold)},
            }
            for table in result.tables
        ],
        "plots": [{"name": plot.name, "caption": plot.caption, "data": plot.data} for plot in result.plots],
    }
    paths[0].write_text(json.dumps(_to_json(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for table in result.tables:
        paths.append(folder / f"{name}-{table.name}.csv")
        _write_csv(paths[-1], table.data)
    for plot in result.plots:
        for format in ("svg", "png"):
            paths.append(folder / f"{name}-{plot.name}.{format}")
            paths[-1].write_bytes(render_plot(plot, format))
    return paths


@cache  # the file and the page hold the same image, which takes a second
def render_plot(plot: Plot, format: Literal["svg", "png"]) -> bytes:
    """Return a figure as an image file; equal figures give equal files."""
    buffer = io.BytesIO()
    metadata = {"Date": None} if format == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):  # which holds the salt of the names inside an SVG
        plot.figure.savefig(buffer, format=format, dpi=DOTS, metadata=metadata)
    return buffer.getvalue()


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _to_json(value) for name, value in row.items()} for row in rows)


def _to_json(value: Any) -> Any:
    """Return ``value`` as JSON has it; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _to_json(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return _to_json(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
