"""Formats of the logs that other programs write: how each is recognised, and the points in it."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.registry import Registry

STEP_COLUMNS = (
    *("global_step", "trainer/global_step", "train/global_step", "step", "Step", "steps", "_step"),
    *("iteration", "iter"),
)
"""Names under which a table holds its steps; the first one present is read. W&B's own `_step` counts calls of `log`, so
a column that the trainer wrote comes before it."""

INCOMPLETE_LINE = "the last line is incomplete, as after a crash, and is dropped"

Point = tuple[int | None, str, float | str]
"""(step, name of the curve, value). The step is None where the record had none; the value is a text where the record
held no number."""


@dataclass(frozen=True)
class LogFormat:
    """A format of logs.

    Args:
        title: What a user knows the format as.
        recognises: Whether a path, a file or a folder, is a log of this format.
        read_points: Reads the points of a log in their own order, from its path and the column of steps or None.
        has_step_column: Whether a user can name the column of steps.
        file_names: Names under which a folder holds such a log.
    """

    title: str
    recognises: Callable[[Path], bool]
    read_points: Callable[[Path, str | None], Iterator[Point]]
    has_step_column: bool = False
    file_names: tuple[str, ...] = ()


LOG_FORMATS: Registry[LogFormat] = Registry("log format", "dvar.log_formats")
"""The formats that can be read. The one registered last is asked first, so that a format of another package, under the
entry point group "dvar.log_formats", comes before the general ones here."""


def list_formats() -> list[LogFormat]:
    """Return all formats in the order in which they are asked."""
    return [LOG_FORMATS[name] for name in reversed(list(LOG_FORMATS))]


def recognise_format(path: Path) -> LogFormat:
    """Return the format of a log.

    Raises:
        RefusedInput: No format recognises it; the message names all of them.
    """
    formats = list_formats()
    for log_format in formats:
        if log_format.recognises(path):
            return log_format
    titles = "; ".join(log_format.title for log_format in formats)
    raise RefusedInput([f"{path} is in no known format: use one of these: {titles}"])


def find_log(path: Path) -> Path:
    """Return the file in a folder that holds its curves; else ``path`` itself."""
    files = (path / name for log_format in list_formats() for name in log_format.file_names)
    return next((file for file in files if file.exists()), path)


def format_names(names: Iterable[str], limit: int = 20) -> str:
    """Return the first ``limit`` names as a sentence lists them."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more)


# --- tables: CSV, JSON, JSON lines ----------------------------------------------------------------------------------


def _read_rows(rows: Iterable[Mapping[str, Any]], path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of a table with one row per record and one column per curve."""
    flat_rows = [dict(_flatten(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat_rows for name in row))
    column = step_column or next((name for name in STEP_COLUMNS if name in columns), None)
    if column not in columns:
        problem = f"no column {step_column!r}" if step_column else f"none of the columns {', '.join(STEP_COLUMNS)}"
        raise RefusedInput([f"{path} has {problem}: name the column of steps, of {format_names(columns)}"])
    for row in flat_rows:
        step = _parse_step(row.get(column), path, str(column))
        for name, cell in row.items():
            value = _parse_value(cell)
            if name != column and value is not None:
                yield step, name, value


def _flatten(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the cells of a row, those inside a mapping with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            # SimpleTuner puts all its metrics under this one name.
            yield from ((inner if name == "metrics" else f"{name}.{inner}", cell) for inner, cell in _flatten(value))
        else:
            yield name, value


def _parse_value(cell: Any) -> float | str | None:
    """Return a cell as a number; None where it is empty, its text where it holds no number."""
    if cell is None or isinstance(cell, bool | list) or cell == "":
        return None
    try:
        return float(cell)
    except (TypeError, ValueError):
        return str(cell)


def _parse_step(cell: Any, path: Path, column: str) -> int | None:
    """Return a cell of the column of steps as a whole number; None where it is empty or nan."""
    value = _parse_value(cell)
    if value is None or value != value:
        return None
    if isinstance(value, str) or not value.is_integer():
        raise RefusedInput([f"{path}: a step must be a whole number of updates, got {cell!r} under {column}: fix it"])
    return int(value)


def _read_csv(path: Path, step_column: str | None) -> Iterator[Point]:
    text = _read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_find_delimiter(text))
    numbered_rows = [(reader.line_num, row) for row in reader]
    if numbered_rows and None in numbered_rows[-1][1].values():
        warnings.warn(f"{path}: {INCOMPLETE_LINE}", stacklevel=2)
        numbered_rows.pop()
    for number, row in numbered_rows:
        # DictReader fills up a line of too few cells with None, and collects the surplus ones under None.
        if None in row.values() or any(row.get(None, ())):
            raise RefusedInput([f"{path}, line {number} has a different number of cells than the header: fix it"])
    # W&B's charts come with the bounds of each curve, which repeat the curve.
    rows = (
        {name: cell for name, cell in row.items() if name and not name.endswith(("__MIN", "__MAX"))}
        for _, row in numbered_rows
    )
    return _read_rows(rows, path, step_column)


def _find_delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def _read_json(path: Path, step_column: str | None) -> Iterator[Point]:
    """Return the points of a JSON document, or else of JSON lines."""
    text = _read_text(path)
    try:
        document = json.loads(text)
    except ValueError:
        return _read_rows(_parse_lines(path, text), path, step_column)
    return _read_rows(_parse_records(document, path), path, step_column)


def _parse_lines(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of JSON lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise RefusedInput([f"{path}, line {number} is not JSON ({error}): restore the file"]) from error
            warnings.warn(f"{path}: {INCOMPLETE_LINE}", stacklevel=2)
            return
        if not isinstance(row, dict):
            raise RefusedInput([f"{path}, line {number} must be a JSON object, got {line[:40]!r}: restore the file"])
        yield row


def _parse_records(document: Any, path: Path) -> list[Mapping[str, Any]]:
    """Return the rows of a JSON document: a list of objects, or an object with a list or an object per column."""
    if isinstance(document, list) and all(isinstance(row, dict) for row in document):
        return document
    if isinstance(document, dict) and document and all(isinstance(cells, dict | list) for cells in document.values()):
        columns = {
            name: dict(enumerate(cells)) if isinstance(cells, list) else cells for name, cells in document.items()
        }
        indices = dict.fromkeys(index for cells in columns.values() for index in cells)
        return [{name: cells.get(index) for name, cells in columns.items()} for index in indices]
    if isinstance(document, dict):
        return [document]
    raise RefusedInput([f"{path} must hold records, got {str(document)[:40]!r}: export a list of objects, or columns"])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"{path} cannot be read as text ({error}): check the file"]) from error


def _read_head(path: Path) -> bytes:
    """Return the first 4096 bytes of a file, without a byte order mark and leading white space."""
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def _is_table(path: Path) -> bool:
    head = _read_head(path)
    header = head.partition(b"\n")[0]
    return b"\0" not in head and any(delimiter in header for delimiter in (b",", b";", b"\t"))


LOG_FORMATS.register(
    "csv",
    LogFormat(
        "CSV with a header (W&B's charts and run history, Lightning's metrics.csv)",
        _is_table,
        _read_csv,
        has_step_column=True,
    ),
)


# --- ai-toolkit's database ------------------------------------------------------------------------------------------


def _read_sqlite(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of ai-toolkit's table "metrics" of (step, key, value_real, value_text).

    SQLite cannot hold a nan and stores NULL instead: a record without either value was one.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = connection.execute("SELECT step, key, value_real, value_text FROM metrics ORDER BY step").fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise RefusedInput(
            [f"{path} must hold ai-toolkit's table of metrics, and does not ({error}): export the curve as CSV"]
        ) from error
    for step, name, value, text in rows:
        yield int(step), str(name), float("nan" if value is None else value) if text is None else str(text)


LOG_FORMATS.register(
    "ai-toolkit",
    LogFormat(
        "ai-toolkit's loss_log.db",
        lambda path: _read_head(path).startswith(b"SQLite format 3\0"),
        _read_sqlite,
        file_names=("loss_log.db",),
    ),
)


# --- JSON, TensorBoard and our own traces ---------------------------------------------------------------------------

LOG_FORMATS.register(
    "json",
    LogFormat(
        "JSON or JSON lines, one object per record (W&B's run history, SimpleTuner's training_metrics.jsonl)",
        lambda path: _read_head(path)[:1] in (b"{", b"["),
        _read_json,
        has_step_column=True,
        file_names=("training_metrics.jsonl",),
    ),
)


def _has_events(path: Path) -> bool:
    return any(path.rglob("*tfevents*")) if path.is_dir() else "tfevents" in path.name


def _read_tensorboard(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of an event file, or of the one run in a folder."""
    folders = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    runs = [(folder, points) for folder in folders if (points := _read_events(path, folder))]
    if len(runs) > 1:
        names = format_names([str(folder) for folder, _ in runs])
        raise RefusedInput([f"{path} holds the event files of {len(runs)} runs: name the folder of one, of {names}"])
    for _, points in runs:
        yield from points


def _read_events(path: Path, folder: Path) -> list[Point]:
    """Return the points of one event file, or of all event files of one run."""
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise RefusedInput([f"{path}: event files need {package}: pip install 'dvar[tensorboard]'"]) from error
    # Every record, also those before a restart: `read_log` drops what a resumed run repeats, for all formats alike.
    events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
    events.Reload()
    points: list[Point] = [
        (event.step, tag, float(event.value)) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
    ]
    for tag in events.Tags()["tensors"]:  # writers of the newer style keep their scalars here, among other things
        tensors = ((event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag))
        points += [
            (step, tag, float(value)) for step, value in tensors if value.size == 1 and value.dtype.kind in "fiu"
        ]
    return points


LOG_FORMATS.register(
    "tensorboard",
    LogFormat(
        "TensorBoard's event files, or a folder of them (diffusers, kohya, OneTrainer)", _has_events, _read_tensorboard
    ),
)

TRACE_FORMAT = LOG_FORMATS.register(
    "trace",
    LogFormat(
        "a trace.jsonl of dvar",
        lambda path: b'"dvar_trace"' in _read_head(path).partition(b"\n")[0],
        _read_json,
        file_names=("trace.jsonl",),
    ),
)
