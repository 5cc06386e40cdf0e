"""Databases of SQLite: those of ai-toolkit, trackio and MLflow."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.files import check_regular, parse_json
from dvar.logs.log_format import LogFormat, Point, read_head
from dvar.logs.tables import STEP_COLUMNS, parse_step, read_rows

_MAGIC = b"SQLite format 3\0"


def _query(path: Path, query: str) -> list[tuple[Any, ...]]:
    check_regular(path)
    # Where the second file is missing, SQLite would create it.
    mode = "immutable=1" if _lacks_wal(path) else "mode=ro"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?{mode}", uri=True)) as connection:
        return connection.execute(query).fetchall()


def _lacks_wal(path: Path) -> bool:
    """Return whether the program wrote its newest records to a second file, PATH-wal, that is not beside this one.

    It is not there either once the program has ended and moved all records to the first file.
    """
    with path.open("rb") as file:
        return file.read(20)[18:] == b"\2\2" and not path.with_name(f"{path.name}-wal").exists()


def _is_database(path: Path) -> bool:
    return read_head(path).startswith(_MAGIC)


def _list_columns(path: Path) -> set[str]:
    """Return the columns of the table "metrics"; none where there is no such table, or the file is damaged."""
    try:
        return {name for _, name, *_ in _query(path, "PRAGMA table_info(metrics)")} if _is_database(path) else set()
    except sqlite3.Error:
        return set()


def _select(path: Path, query: str, program: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query.

    Raises:
        RefusedInput: The database does not hold what ``program`` writes, is damaged, or lies without its newest part.
    """
    try:
        return _query(path, query)
    except sqlite3.Error as error:
        if _lacks_wal(path):
            wal = f"{path.name}-wal"
            raise RefusedInput(
                [f"{path} was copied without {wal}, which holds its newest records ({error}): copy that file too"]
            ) from error
        raise RefusedInput(
            [f"{path} must hold {program}'s table of metrics, and does not ({error}): export the curve as CSV"]
        ) from error


def _prefix_runs(runs: Mapping[str, str]) -> dict[str, str]:
    """Return what comes before the names of the curves of each run, by its id: nothing where there is only one."""
    names = list(runs.values())
    return {
        run: "" if len(runs) == 1 else f"{name if names.count(name) == 1 else run} - " for run, name in runs.items()
    }


def _read_ai_toolkit(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of ai-toolkit's table "metrics" of (step, key, value_real, value_text).

    SQLite cannot hold a nan and stores NULL instead: a record without either value was one.
    """
    query = "SELECT step, key, value_real, value_text FROM metrics ORDER BY step"
    for step, name, value, text in _select(path, query, "ai-toolkit"):
        number = float("nan" if value is None else value) if text is None else str(text)
        yield parse_step(step, path, "step"), str(name), number


def _read_trackio(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of trackio's table "metrics", which holds a JSON object for each call of `log`."""
    run = "run_id" if "run_id" in _list_columns(path) else "run_name"
    rows = _select(path, f"SELECT {run}, run_name, step, metrics FROM metrics ORDER BY id", "trackio")
    prefixes = _prefix_runs({run: name for run, name, *_ in rows})
    return read_rows(_parse_trackio(rows, prefixes, path), path, step_column)


def _parse_trackio(
    rows: Iterable[tuple[Any, ...]], prefixes: Mapping[str, str], path: Path
) -> Iterator[Mapping[str, Any]]:
    for run, _, step, text in rows:
        try:
            metrics = parse_json(text)
        except ValueError as error:
            raise RefusedInput([f"{path}: the record of step {step} is not JSON ({error}): restore it"]) from error
        names = {name: name if name in STEP_COLUMNS else prefixes[run] + name for name in metrics}
        yield {**{names[name]: value for name, value in metrics.items()}, "step": step}


def _read_mlflow_database(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of MLflow's table "metrics", which holds 0 and a mark in the place of a nan."""
    query = (
        "SELECT run_uuid, runs.name, step, key, value, is_nan FROM metrics LEFT JOIN runs USING (run_uuid) "
        "ORDER BY timestamp, step"
    )
    rows = _select(path, query, "MLflow")
    prefixes = _prefix_runs({run: name or run for run, name, *_ in rows})
    for run, _, step, key, value, is_nan in rows:
        yield parse_step(step, path, "step"), f"{prefixes[run]}{key}", float("nan") if is_nan else float(value)


AI_TOOLKIT = LogFormat(
    "ai-toolkit's loss_log.db",
    _is_database,
    _read_ai_toolkit,
    file_names=("loss_log.db",),
    cadence_setting="log_every: 1 under logging",
)
TRACKIO = LogFormat(
    "trackio's database PROJECT.db",
    lambda path: {"metrics", "run_name"} <= _list_columns(path),
    _read_trackio,
    has_step_column=True,
)
MLFLOW_DATABASE = LogFormat(
    "MLflow's database mlflow.db",
    lambda path: {"run_uuid", "key", "is_nan"} <= _list_columns(path),
    _read_mlflow_database,
    file_names=("mlflow.db",),
)
