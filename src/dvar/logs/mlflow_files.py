"""The files that MLflow keeps for each run: a folder with one file for each metric."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import read_text
from dvar.logs.log_format import LogFormat, Point, format_names


def _list_runs(path: Path) -> list[Path]:
    """Return the folders of runs: ``path`` itself, or those in an experiment or in a store of experiments."""
    if not path.is_dir():
        return []
    folders = (path, *path.glob("*"), *path.glob("*/*"))
    return sorted(folder for folder in folders if (folder / "metrics").is_dir() and (folder / "meta.yaml").is_file())


def _read_mlflow_files(path: Path, step_column: str | None) -> Iterator[Point]:
    """Yield the points of the one run in a folder; a line of a metric's file is "timestamp value step"."""
    runs = _list_runs(path)
    if len(runs) > 1:
        names = format_names(map(str, runs))
        raise RefusedInput([f"{path} holds {len(runs)} runs of MLflow: name the folder of one, of {names}"])
    folder = runs[0] / "metrics"
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder).as_posix()
        try:
            lines = read_text(file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise RefusedInput([f"{file} cannot be read as text ({error}): restore the file"]) from error
        for number, line in enumerate(lines, start=1):
            try:
                _, value, step = line.split()
                yield int(step), name, float(value)
            except ValueError as error:
                raise RefusedInput(
                    [f'{file}, line {number} must be "timestamp value step", got {line[:40]!r}: restore the file']
                ) from error


MLFLOW_FILES = LogFormat(
    "the folder of a run in MLflow's mlruns", lambda path: bool(_list_runs(path)), _read_mlflow_files
)
