"""A format of logs: how a log is recognised, and the points in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dvar.files import check_regular
from dvar.registry import Registry

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
        file_names: Names or patterns of the files, relative to a folder, that hold such a log: "loss_log.db",
            "*.wandb".
        is_text_table: Whether each line is a record, so that one without its line break may still be being written.
        cadence_setting: The setting by which a user makes the program log more often, for messages.
    """

    title: str
    recognises: Callable[[Path], bool]
    read_points: Callable[[Path, str | None], Iterator[Point]]
    has_step_column: bool = False
    file_names: tuple[str, ...] = ()
    is_text_table: bool = False
    cadence_setting: str = ""


LOG_FORMATS: Registry[LogFormat] = Registry("log format", "dvar.log_formats")
"""The formats that can be read. The one registered last is asked first, so that a format of another package, under the
entry point group "dvar.log_formats", comes before the general ones here."""


def format_names(names: Iterable[str], limit: int = 20) -> str:
    """Return the first ``limit`` names as a sentence lists them."""
    names = list(names)
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(names[:limit] + more)


def read_head(path: Path) -> bytes:
    """Return the first 4096 bytes of a file, without a byte order mark and leading white space; none of a folder."""
    if path.is_dir():
        return b""
    check_regular(path)
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
