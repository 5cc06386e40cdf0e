"""Files and folders that are written whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dvar.locks import LOCK, lock_path


def read_json(path: Path) -> Any:
    """Return the value that a JSON file holds.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON in UTF-8.
    """
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, and the new is on the disk on return."""
    with staged_file(path) as staged:
        staged.write_bytes(content)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file that is on the disk on return; a reader may see a part of it."""
    path.write_bytes(content)
    _sync_file(path)


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success, sync the file to the disk and rename it to ``path``."""
    staged = path.with_name(f"{path.name}.part")
    yield staged
    _sync_file(staged)
    staged.replace(path)


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` to fill; on success, rename it to ``path``, in place of an older one.

    A reader never sees a part of the folder. Its files must be on the disk already where that matters: `write_synced`.

    Raises:
        RefusedInput: Another process writes this folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock_path(path.with_name(f".{path.name}{LOCK}"), path):
        staged = path.with_name(f".{path.name}.part")
        remove(staged)
        staged.mkdir()
        yield staged
        _sync_folder(staged)
        remove(path)
        staged.replace(path)
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_file(path: Path) -> None:
    """Put the content of a file on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Put the entries of a folder on the disk, where the system can (Windows cannot, and does not need to)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
