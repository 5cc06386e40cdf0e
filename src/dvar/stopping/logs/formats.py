"""The formats that other software records curves in: how each is recognised, and the points in it.

CSV, JSON and SQLite need the standard library alone; TensorBoard's reader is imported when such a file is met.
"""

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

STEP_COLUMNS = (
    *("global_step", "trainer/global_step", "train/global_step", "step", "Step", "steps", "_step"),
    *("iteration", "iter"),
)
"""Names under which a table holds its steps, the first that is there.  W&B's own `_step` counts calls of `log`, so that
a column written by the trainer goes before it."""

Point = tuple[int | None, str, float | str]
"""(step, name of the curve, value); a step of None where the record had none, text where it was no number."""


@dataclass(frozen=True)
class Format:
    """A format, by the name a person knows it under.

    `points(path, step)` gives what a log holds in its own order; `step` is the column of steps where it `has_columns`.
    """

    name: str
    recognises: Callable[[Path], bool]
    points: Callable[[Path, str | None], Iterator[Point]]
    has_columns: bool = False


def format_of(path: Path) -> Format:
    """The format of a log.

    Raises: RefusedInput when it is none of `FORMATS`; all of them are named.
    """
    for known in FORMATS:
        if known.recognises(path):
            return known
    names = "; ".join(known.name for known in FORMATS)
    raise RefusedInput([f"{path} is in no format that is known here: give {names}"])


def log_in(path: Path) -> Path:
    """The file in a folder that holds its curves; the folder itself where these are TensorBoard's, or any file."""
    named = (path / name for name in ("trace.jsonl", "training_metrics.jsonl", "loss_log.db"))
    return next((found for found in named if found.exists()), path)


def listed(names: Iterable[str], most: int = 20) -> str:
    """The names as a sentence lists them, the first `most` of them."""
    names = list(names)
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join(names[:most] + more)


# --- tables: CSV, JSON, JSON lines ----------------------------------------------------------------------------------


def _in_rows(rows: Iterable[Mapping[str, Any]], path: Path, step: str | None) -> Iterator[Point]:
    """The numbers of a table, one row a record and one column a curve."""
    flat = [dict(_flat(row)) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    counted = step or next((name for name in STEP_COLUMNS if name in columns), None)
    if counted not in columns:
        lacking = f"no column {step!r}" if step else f"none of the columns {', '.join(STEP_COLUMNS)}"
        raise RefusedInput([f"{path} has {lacking}: name the column of steps, of {listed(columns)}"])
    for row in flat:
        at = _whole(row.get(counted), path, str(counted))
        for name, value in row.items():
            number = _number(value)
            if name != counted and number is not None:
                yield at, name, number


def _flat(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            # SimpleTuner puts all its metrics under this one name.
            yield from ((inner if name == "metrics" else f"{name}.{inner}", each) for inner, each in _flat(value))
        else:
            yield name, value


def _number(value: Any) -> float | str | None:
    """The value as a number; None where there is none, the text itself where it is no number."""
    if value is None or isinstance(value, bool | list) or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _whole(value: Any, path: Path, name: str) -> int | None:
    number = _number(value)
    if number is None or number != number:
        return None
    if isinstance(number, str) or not number.is_integer():
        raise RefusedInput([f"{path}: a step must be a whole number of updates, got {value!r} under {name}: mend it"])
    return int(number)


def _csv(path: Path, step: str | None) -> Iterator[Point]:
    text = _text(path)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=_delimiter(text))
    numbered = [(reader.line_num, row) for row in reader]
    if numbered and None in numbered[-1][1].values():
        warnings.warn(f"{path}: the last line was torn while it was written and is dropped", stacklevel=2)
        numbered.pop()
    for number, row in numbered:
        if None in row.values() or any(row.get(None, ())):  # DictReader's words for too few cells and for too many
            raise RefusedInput([f"{path}, line {number} has another number of cells than the line of names: mend it"])
    # W&B's charts come with the bounds of each curve, which are the curve again.
    rows = (
        {name: value for name, value in row.items() if name and not name.endswith(("__MIN", "__MAX"))}
        for _, row in numbered
    )
    return _in_rows(rows, path, step)


def _delimiter(text: str) -> str:
    head = text.partition("\n")[0]
    return max(",;\t", key=head.count)


def _json(path: Path, step: str | None) -> Iterator[Point]:
    text = _text(path)
    try:
        whole = json.loads(text)
    except ValueError:
        return _in_rows(_lines(path, text), path, step)
    return _in_rows(_records(whole, path), path, step)


def _lines(path: Path, text: str) -> Iterator[Mapping[str, Any]]:
    lines = [line for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise RefusedInput([f"{path}, line {number} is no JSON ({error}): restore the file"]) from error
            warnings.warn(f"{path}: the last line was torn while it was written and is dropped", stacklevel=2)
            return
        if not isinstance(row, dict):
            raise RefusedInput([f"{path}, line {number} must be a JSON object, got {line[:40]!r}: restore the file"])
        yield row


def _records(whole: Any, path: Path) -> list[Mapping[str, Any]]:
    """The rows of a JSON document: a list of objects, or an object with a list or an object of rows for each column."""
    if isinstance(whole, list) and all(isinstance(row, dict) for row in whole):
        return whole
    if isinstance(whole, dict) and whole and all(isinstance(column, dict | list) for column in whole.values()):
        columns = {name: dict(enumerate(cells)) if isinstance(cells, list) else cells for name, cells in whole.items()}
        places = dict.fromkeys(place for cells in columns.values() for place in cells)
        return [{name: cells.get(place) for name, cells in columns.items()} for place in places]
    if isinstance(whole, dict):
        return [whole]
    raise RefusedInput([f"{path} must hold records, got {str(whole)[:40]!r}: export a list of objects, or columns"])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"{path} cannot be read as text ({error}): check the file"]) from error


# --- databases and event files --------------------------------------------------------------------------------------


def _sqlite(path: Path, step: str | None) -> Iterator[Point]:
    """ai-toolkit's table "metrics" of (step, key, value_real, value_text).

    SQLite cannot hold a nan and keeps NULL in its place: a record without either value was one.
    """
    try:
        opened = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        try:
            rows = opened.execute("SELECT step, key, value_real, value_text FROM metrics ORDER BY step").fetchall()
        finally:
            opened.close()
    except sqlite3.Error as error:
        raise RefusedInput(
            [f"{path} must hold ai-toolkit's table of metrics, and does not ({error}): export the curve as CSV"]
        ) from error
    for at, name, value, said in rows:
        yield int(at), str(name), float("nan" if value is None else value) if said is None else str(said)


def _tensorboard(path: Path, step: str | None) -> Iterator[Point]:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from tensorboard.util.tensor_util import make_ndarray
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        raise RefusedInput([f"{path}: event files need {package}: pip install 'dvar[tensorboard]'"]) from error
    folders = sorted({file.parent for file in path.rglob("*tfevents*")}) if path.is_dir() else [path]
    read = []
    for folder in folders:
        # Every record, also those before a restart: what a resumed run repeats is sorted out once, for all formats.
        events = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}, purge_orphaned_data=False)
        events.Reload()
        points: list[Point] = [
            (event.step, tag, float(event.value)) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)
        ]
        for tag in events.Tags()["tensors"]:  # where writers of the newer style keep their scalars, among other things
            tensors = ((event.step, make_ndarray(event.tensor_proto)) for event in events.Tensors(tag))
            points += [
                (at, tag, float(value)) for at, value in tensors if value.size == 1 and value.dtype.kind in "fiu"
            ]
        if points:
            read.append((folder, points))
    if len(read) > 1:
        runs = listed([str(folder) for folder, _ in read])
        raise RefusedInput([f"{path} holds the event files of {len(read)} runs: name the folder of one, of {runs}"])
    for _, points in read:
        yield from points


# --- the formats ----------------------------------------------------------------------------------------------------


def _head(path: Path) -> bytes:
    if path.is_dir():
        return b""
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()


def _has_events(path: Path) -> bool:
    return any(path.rglob("*tfevents*")) if path.is_dir() else "tfevents" in path.name


def _is_table(path: Path) -> bool:
    head = _head(path)
    first = head.partition(b"\n")[0]
    return b"\0" not in head and any(mark in first for mark in (b",", b";", b"\t"))


OWN = Format("a trace.jsonl of dvar", lambda path: b'"dvar_trace"' in _head(path).partition(b"\n")[0], _json)
FORMATS = (
    OWN,
    Format("TensorBoard's event files, or a folder of them (diffusers, kohya, OneTrainer)", _has_events, _tensorboard),
    Format("ai-toolkit's loss_log.db", lambda path: _head(path).startswith(b"SQLite format 3\0"), _sqlite),
    Format(
        "JSON or JSON lines, an object a record (W&B's run history, SimpleTuner's training_metrics.jsonl)",
        lambda path: _head(path)[:1] in (b"{", b"["),
        _json,
        has_columns=True,
    ),
    Format("CSV with a line of names (W&B's charts and run history, Lightning's metrics.csv)", _is_table, _csv, True),
)
"""What can be read; a log is of the first format that recognises it."""
