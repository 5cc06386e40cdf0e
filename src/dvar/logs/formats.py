"""The formats of the logs that other programs write, and which of them a log is in."""

from __future__ import annotations

from pathlib import Path

from dvar.errors import RefusedInput
from dvar.logs.databases import AI_TOOLKIT, MLFLOW_DATABASE, TRACKIO
from dvar.logs.event_files import TENSORBOARD
from dvar.logs.log_format import LOG_FORMATS, LogFormat, format_names, read_head
from dvar.logs.mlflow_files import MLFLOW_FILES
from dvar.logs.tables import CSV, JSON, LONG_CSV, TRAINER_STATE, read_json_rows
from dvar.logs.wandb_file import WANDB

__all__ = [
    "LOG_FORMATS",
    "TRACE_FORMAT",
    "LogFormat",
    "find_log",
    "format_names",
    "list_formats",
    "recognise_format",
]

TRACE_FORMAT = LogFormat(
    "a trace.jsonl of dvar",
    lambda path: b'"dvar_trace"' in read_head(path).partition(b"\n")[0],
    read_json_rows,
    file_names=("trace.jsonl",),
)

LOG_FORMATS.register("csv", CSV)
LOG_FORMATS.register("long-csv", LONG_CSV)
LOG_FORMATS.register("json", JSON)
LOG_FORMATS.register("trainer-state", TRAINER_STATE)
LOG_FORMATS.register("ai-toolkit", AI_TOOLKIT)
LOG_FORMATS.register("mlflow-database", MLFLOW_DATABASE)
LOG_FORMATS.register("trackio", TRACKIO)
LOG_FORMATS.register("wandb", WANDB)
LOG_FORMATS.register("tensorboard", TENSORBOARD)
LOG_FORMATS.register("mlflow-files", MLFLOW_FILES)
LOG_FORMATS.register("trace", TRACE_FORMAT)


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
    """Return the file in a folder that holds its curves, the newest where several are of one format; else ``path``."""
    if not path.is_dir():
        return path
    for log_format in list_formats():
        files = [file for pattern in log_format.file_names for file in path.glob(pattern) if file.is_file()]
        if files:
            return max(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    return path
