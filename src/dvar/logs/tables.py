"""Tables of numbers over steps: CSV, JSON and JSON lines."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.files import parse_json, read_text
from dvar.logs.log_format import LogFormat, Point, format_names, read_head

STEP_COLUMNS = (
    *("global_step", "trainer/global_step", "train/global_step", "step", "Step", "steps", "_step"),
    *("iteration", "iter"),
)
"""Names under which a table holds its steps; the first one present is read. W&B's own `_step` counts calls of `log`, so
a column that the trainer wrote comes before it."""

INCOMPLETE_LINE = "the last line is incomplete, as after a crash, and is dropped"

# Columns of a table with one value per line: the name of the curve, and its value.
_KEY_COLUMNS, _VALUE_COLUMNS = ("key", "name", "metric", "tag"), ("value",)


def read_rows(rows: Iterable[Mapping[str, Any]], path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of a table with one row per record and one column per curve."""
    flat_rows = [dict(_flatten(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat_rows for name in row))
    column = step_column or next((name for name in STEP_COLUMNS if name in columns), None)
    if not columns:
        return
    if column is None or column not in columns:
        problem = f"no column {step_column!r}" if step_column else f"none of the columns {', '.join(STEP_COLUMNS)}"
        raise RefusedInput([f"{path} has {problem}: name the column of steps, of {format_names(columns)}"])
    for row in flat_rows:
        step = parse_step(row.get(column), path, column)
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
    if isinstance(cell, str) and "_" in cell:  # Python reads 1_900 as 1900, and nobody else does
        return cell
    try:
        return float(cell)
    except OverflowError:  # a whole number of JSON beyond the largest float
        return math.inf if cell > 0 else -math.inf
    except (TypeError, ValueError):
        return str(cell)


def parse_step(cell: Any, path: Path, column: str) -> int | None:
    """Return a cell of the column of steps as a whole number; None where it is empty or nan.

    Raises:
        RefusedInput: It is neither.
    """
    value = _parse_value(cell)
    if value is None or value != value:
        return None
    if isinstance(value, str) or not value.is_integer():
        raise RefusedInput([f"{path}: a step must be a whole number of updates, got {cell!r} under {column}: fix it"])
    return int(value)


def _read_csv(path: Path, step_column: str | None) -> Iterator[Point]:
    # W&B's charts come with the bounds of each curve, which repeat the curve.
    rows = (
        {name: cell for name, cell in row.items() if name and not name.endswith(("__MIN", "__MAX"))}
        for row in _parse_csv(path)
    )
    return read_rows(rows, path, step_column)


def _read_long_csv(path: Path, step_column: str | None) -> Iterator[Point]:
    columns = _list_columns(path)
    keys, values = _find_columns(columns, _KEY_COLUMNS), _find_columns(columns, _VALUE_COLUMNS)
    steps = {step_column, *STEP_COLUMNS} - {keys[0], values[0]}
    rows = (
        {**{name: cell for name, cell in row.items() if name in steps}, row[keys[0]]: row[values[0]]}
        for row in _parse_csv(path)
    )
    return read_rows(rows, path, step_column)


def _parse_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, without a last one that is incomplete."""
    text = _read_text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_find_delimiter(text))
    columns = [name for name in reader.fieldnames or () if name]
    if repeated := [name for name, count in Counter(columns).items() if count > 1]:
        raise RefusedInput([f"{path} has several columns {repeated[0]!r}: rename or remove all but one"])
    numbered_rows = [(reader.line_num, row) for row in reader]
    if numbered_rows and None in numbered_rows[-1][1].values():
        warnings.warn(f"{path}: {INCOMPLETE_LINE}", stacklevel=2)
        numbered_rows.pop()
    for number, row in numbered_rows:
        # DictReader fills up a line of too few cells with None, and collects the surplus ones under None.
        if None in row.values() or any(row.get(None, ())):
            raise RefusedInput([f"{path}, line {number} has a different number of cells than the header: fix it"])
    return [row for _, row in numbered_rows]


def _find_delimiter(text: str) -> str:
    header = text.partition("\n")[0]
    return max(",;\t", key=header.count)


def read_json_rows(path: Path, step_column: str | None) -> Iterator[Point]:
    """Return the points of a JSON document, or else of JSON lines."""
    text = _read_text(path)
    try:
        document = parse_json(text)
    except ValueError:
        return read_rows(_parse_lines(path, text), path, step_column)
    return read_rows(_parse_records(document, path), path, step_column)


def _parse_lines(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of JSON lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
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
        return read_text(path, "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"{path} cannot be read as text ({error}): check the file"]) from error


def _is_table(path: Path) -> bool:
    head = read_head(path)
    header = head.partition(b"\n")[0]
    return b"\0" not in head and any(delimiter in header for delimiter in (b",", b";", b"\t"))


def _list_columns(path: Path) -> list[str]:
    """Return the names in the first line of a CSV file."""
    header = "".join(read_head(path).decode("utf-8", errors="replace").splitlines()[:1]).strip()
    return next(csv.reader([header], delimiter=_find_delimiter(header)), [])


def _find_columns(columns: Iterable[str], names: tuple[str, ...]) -> list[str]:
    return [column for column in columns if column.lower() in names]


def _is_long_table(path: Path) -> bool:
    columns = _list_columns(path) if _is_table(path) else []
    return all(_find_columns(columns, names) for names in (_KEY_COLUMNS, _VALUE_COLUMNS))


def _is_json(path: Path) -> bool:
    return read_head(path)[:1] in (b"{", b"[")


def _read_trainer_state(path: Path, step_column: str | None) -> Iterator[Point]:
    """Return the points of the history that transformers' `Trainer` saves with each checkpoint."""
    try:
        rows = parse_json(_read_text(path))["log_history"]
    except ValueError as error:
        raise RefusedInput([f"{path} is not whole JSON ({error}): wait for the checkpoint, or restore it"]) from error
    return read_rows(_parse_records(rows, path), path, step_column)


CSV = LogFormat(
    "CSV with a header (W&B's charts and run history, Lightning's metrics.csv)",
    _is_table,
    _read_csv,
    has_step_column=True,
    is_text_table=True,
    file_names=("metrics.csv", "version_*/metrics.csv", "lightning_logs/version_*/metrics.csv"),
)
LONG_CSV = LogFormat(
    "CSV with one value per line, step,key,value (DiffSynth's loss.csv)",
    _is_long_table,
    _read_long_csv,
    has_step_column=True,
    file_names=("loss.csv",),
    is_text_table=True,
)
JSON = LogFormat(
    "JSON or JSON lines, one object per record (W&B's run history, SimpleTuner's training_metrics.jsonl)",
    _is_json,
    read_json_rows,
    has_step_column=True,
    file_names=("training_metrics.jsonl", "history.json"),
)
TRAINER_STATE = LogFormat(
    "the trainer_state.json of transformers",
    lambda path: _is_json(path) and b'"log_history"' in read_head(path),
    _read_trainer_state,
    has_step_column=True,
    file_names=("trainer_state.json", "checkpoint-*/trainer_state.json"),
    cadence_setting="eval_steps",
)
