"""The file run-ID.wandb, in which W&B keeps everything that a run logs until it is synchronised."""

# Records are Protocol Buffers in the log format of LevelDB. Both formats are public and old. They are parsed here
# because W&B's own reader is no public interface, moved twice, and would have to be installed where only the log is.

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.files import parse_json, read_content
from dvar.logs.log_format import LogFormat, Point, read_head
from dvar.logs.tables import INCOMPLETE_LINE, read_rows

_MAGIC, _FILE_HEADER, _RECORD_HEADER, _BLOCK = b":W&B", 7, 7, 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4  # the parts of a record that a block can hold
_HISTORY, _ITEMS, _HISTORY_STEP = 2, 1, 2  # fields of a record, and of its history
_KEY, _NESTED_KEY, _VALUE = 1, 2, 16  # fields of an item of the history
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # the encodings of a field


def _read_wandb(path: Path, step_column: str | None) -> Iterator[Point]:
    rows = []
    try:
        for record in split_records(read_content(path), path):
            rows += [
                _parse_history(_require_bytes(part)) for number, part in _iter_fields(record) if number == _HISTORY
            ]
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise RefusedInput([f"{path} is damaged ({error}): export the run's history from W&B"]) from error
    return read_rows(rows, path, step_column)


def split_records(content: bytes, path: Path) -> Iterator[bytes]:
    """Yield the records of a file: blocks of 32 KiB hold whole records, or the first, middle and last parts of one."""
    position, record = _FILE_HEADER, b""
    while position < len(content):
        if _BLOCK - position % _BLOCK < _RECORD_HEADER:  # what is left of a block that no header fits in is empty
            position += _BLOCK - position % _BLOCK
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        start, position = position + _RECORD_HEADER, position + _RECORD_HEADER + length
        if position > len(content):
            warnings.warn(f"{path}: {INCOMPLETE_LINE}", stacklevel=3)
            return
        kind = content[start - 1]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST):
            raise ValueError(f"a record of kind {kind}")
        record = content[start:position] if kind in (_FULL, _FIRST) else record + content[start:position]
        if kind in (_FULL, _LAST):
            yield record


def _parse_history(history: bytes) -> Mapping[str, Any]:
    """Return the values of one call of `log`, by their names."""
    row: dict[str, Any] = {}
    for number, content in _iter_fields(history):
        if number == _HISTORY_STEP:
            row.setdefault("_step", dict(_iter_fields(_require_bytes(content))).get(1, 0))
        elif number == _ITEMS:
            fields = list(_iter_fields(_require_bytes(content)))
            keys = [_require_bytes(part).decode() for field, part in fields if field in (_KEY, _NESTED_KEY)]
            row[".".join(filter(None, keys))] = next(
                (parse_json(_require_bytes(part)) for field, part in fields if field == _VALUE), None
            )
    return row


def _require_bytes(content: Any) -> bytes:
    if not isinstance(content, bytes):
        raise ValueError("a number in the place of a text")
    return content


def _iter_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and content of each field of a message: a whole number, or bytes."""
    position = 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        encoding = tag & 7
        if encoding == _VARINT:
            content, position = _read_varint(message, position)
            yield tag >> 3, content
            continue
        if encoding == _BYTES:
            length, position = _read_varint(message, position)
        elif encoding in (_FIXED64, _FIXED32):
            length = 8 if encoding == _FIXED64 else 4
        else:
            raise ValueError(f"a field of encoding {encoding}")
        yield tag >> 3, message[position : position + length]
        position += length


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    """Return a whole number, whose bytes hold seven bits each, the lowest first, and the position after it."""
    value, shift = 0, 0
    while True:
        byte = message[position]
        value |= (byte & 127) << shift
        position, shift = position + 1, shift + 7
        if byte < 128:
            return value, position


WANDB = LogFormat(
    "the file run-ID.wandb of W&B",
    lambda path: read_head(path).startswith(_MAGIC),
    _read_wandb,
    has_step_column=True,
    file_names=("*.wandb",),
)
