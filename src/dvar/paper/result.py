"""A table or figure of the paper as a value, and its files: data (JSON, CSV), pictures (SVG, PNG), a page section."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from dvar.config.training import BUNDLED_MODEL, CONFIGS
from dvar.paper.style import DOTS, STYLE
from dvar.recordings.archive import RecordedRun


@dataclass(frozen=True)
class Table:
    """A table as it is shown, cell by cell, and the numbers behind it, one mapping a row.

    A row of one cell is a heading; ``bold`` are (row, column).
    """

    name: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data: tuple[Mapping[str, Any], ...]
    bold: frozenset[tuple[int, int]] = frozenset()


@dataclass(frozen=True, eq=False)
class Plot:
    """A drawn figure, what it shows in words, and the numbers behind it."""

    name: str
    caption: str
    drawn: Figure
    data: Any = None


@dataclass(frozen=True)
class ExperimentResult:
    """One experiment's result: what it says, and its tables and figures; or, in ``missing``, why there is none."""

    name: str
    title: str
    says: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Provenance:
    """What every figure must state: base model, concepts, seeds, how pictures were scored, and what deviates."""

    models: tuple[str, ...]
    concepts: tuple[str, ...]
    fewer: tuple[tuple[str, int], ...]
    """Methods that were recorded on some of these concepts only, and on how many."""
    seeds: tuple[int, ...]
    pairing: str
    pictures: tuple[int, ...]
    scored: int
    sampling_steps: int
    share: float = 1.0
    halves: str = "the even half chooses, the odd half is reported"

    @classmethod
    def of(cls, records: Sequence[RecordedRun]) -> Provenance:
        """The provenance of what is made from these records."""
        header = records[0].header
        concepts = tuple(sorted({r.concept for r in records}))
        of = {r.method: len({one.concept for one in records if one.method == r.method}) for r in records}
        return cls(
            models=tuple(sorted({str(r.config.get("pretrained_model_name_or_path", "?")) for r in records})),
            concepts=concepts,
            fewer=tuple((method, count) for method, count in of.items() if count < len(concepts)),
            seeds=tuple(sorted({r.seed for r in records})),
            pairing=str(header.get("pairing", "not said")),
            pictures=tuple(sorted({record.count for record in records})),
            scored=int(np.median([len(r.scored_steps) for r in records])),
            sampling_steps=int(header.get("sampling_steps", 0)),
            share=float(header.get("share", 1.0)),
        )

    def __str__(self) -> str:
        model = ", ".join("the bundled model" if name == BUNDLED_MODEL else name for name in self.models)
        pictures = " or ".join(map(str, self.pictures))
        fewer = ", ".join(f"{count} of {title(method)}" for method, count in self.fewer)
        concepts = f"{len(self.concepts)} ({fewer})" if fewer else f"{len(self.concepts)}"
        small = "" if self.share == 1 else f"Trained to {100 * self.share:g} % of the full length, Baseline's cap too. "
        return (
            f"Base model: {model}. Concepts: {concepts}; seeds: {len(self.seeds)}. {small}"
            f"CLIP similarity paired {self.pairing}; {pictures} pictures of each kind at {self.scored} steps, "
            f"{self.sampling_steps} sampling steps; {self.halves}."
        )


def title(method: str) -> str:
    """A method's name for people."""
    return CONFIGS[method].title if method in CONFIGS else method


def compared(claim: str, holds: bool) -> str:
    """A pattern of the paper, in words that say whether it is found here."""
    return f"As in the paper, {claim}." if holds else f"Unlike in the paper, it is not so here that {claim}."


def number(value: float, digits: int = 3) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if not math.isfinite(value) else f"{value:.{digits}f}".replace("-", "−")


def spread(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± standard deviation over concepts (ddof 0); one value has no spread; a dash where there is nothing."""
    found = np.array([value for value in values if math.isfinite(value)])
    if found.size < 2:
        return number(float(found[0]), digits) if found.size else "–"
    return f"{number(float(found.mean()), digits)} ± {number(float(found.std()), digits)}"


def save(exhibit: ExperimentResult, folder: Path) -> list[Path]:
    """Write the exhibit's files into `folder` and return their paths: one JSON, a CSV a table, SVG and PNG a figure."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{exhibit.name}.json"]
    content = {
        "name": exhibit.name,
        "title": exhibit.title,
        "says": exhibit.says,
        "missing": exhibit.missing,
        "tables": [
            {
                "name": table.name,
                "caption": table.caption,
                "rows": table.data,
                "shown": {"columns": table.columns, "cells": table.rows, "bold": sorted(table.bold)},
            }
            for table in exhibit.tables
        ],
        "plots": [{"name": plot.name, "caption": plot.caption, "data": plot.data} for plot in exhibit.plots],
    }
    written[0].write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for table in exhibit.tables:
        written.append(folder / f"{exhibit.name}-{table.name}.csv")
        _csv(written[-1], table.data)
    for plot in exhibit.plots:
        for kind in ("svg", "png"):
            written.append(folder / f"{exhibit.name}-{plot.name}.{kind}")
            written[-1].write_bytes(_drawn(plot, kind))
    return written


@cache  # the file and the page hold the same picture, which takes a second
def _drawn(plot: Plot, kind: str) -> bytes:
    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):  # the salt of the names inside an SVG, so that equal figures are equal files
        plot.drawn.savefig(buffer, format=kind, dpi=DOTS, metadata=metadata)
    return buffer.getvalue()


def _csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({name: _plain(value) for name, value in row.items()} for row in rows)


def _plain(value: Any) -> Any:
    """Numbers as JSON has them; what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    return None if isinstance(value, float) and not math.isfinite(value) else value
