"""Files and folders that are written whole or not at all, files that are read with care, and JSON."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dvar.locks import LOCK, lock_path, unless_empty
from dvar.schema import MAX_DEPTH, find_mismatch, is_encodable, nests_too_deeply

MAX_BYTES = 2**30
"""Size of a text that is read as a whole: more is none of ours, and no log of a run."""
MAX_NAME = 255
"""Bytes that a name may have on every file system in use."""
_LEFT_BESIDE_IMAGES = {"Thumbs.db", "desktop.ini"}


def read_content(path: Path, limit: int | None = MAX_BYTES) -> bytes:
    """Return the content of a file.

    Args:
        path: The file.
        limit: Bytes that it may have; None for weights, of which there may be any number.

    Raises:
        OSError: It cannot be read, has more than ``limit``, or is a pipe, a device or a socket, which may never end.
    """
    size = check_regular(path)
    with path.open("rb") as file:
        if limit is None:
            return file.read()
        content = b"" if size > limit else file.read(limit + 1)
    if max(size, len(content)) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit} bytes", str(path))
    return content


def check_regular(path: Path) -> int:
    """Return the size of a file in bytes; raise an `OSError` if ``path`` is a folder, a pipe, a device or a socket."""
    try:
        status = path.stat()
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, "its name holds a NUL", str(path)) from error
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder", str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket", str(path))
    return status.st_size


def regular_file(path: Path) -> Path:
    """Return ``path``, which another library is to open; raise an `OSError` if it may never end, as `check_regular`."""
    check_regular(path)
    return path


def visible_paths(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted, but for hidden names and what an operating system leaves beside images."""
    paths = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in paths if path.name not in _LEFT_BESIDE_IMAGES]


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file, with line breaks as they are.

    Raises:
        OSError: As `read_content`.
        UnicodeDecodeError: It is not in this encoding.
    """
    return read_content(path).decode(encoding)


def read_json(path: Path, schema: Any = None) -> Any:
    """Return the value that a JSON file holds.

    Args:
        path: The file.
        schema: What the value must look like, as `dvar.schema.find_mismatch` takes it; by default it may be anything.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is not JSON in UTF-8, nests too deeply, or differs from ``schema``.
    """
    value = parse_json(read_text(path))
    if schema is not None and (mismatch := find_mismatch(value, schema)):
        raise ValueError(mismatch)
    return value


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: It is not JSON in UTF-8, holds half a character, or nests too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    brackets = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if brackets > MAX_DEPTH and nests_too_deeply(value):  # a line of a trace is not worth the look
        raise ValueError("it nests too deeply")
    escapes = text.count("\\u") if isinstance(text, str) else text.count(b"\\u")
    if escapes and not is_encodable(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds half of a character, such as \\ud800")
    return value


def writing_problem(path: str | Path, *, folder: bool = False) -> str:
    """Return what keeps a file, or a folder's files, from being written, as far as a look at the disk tells.

    Args:
        path: The path that is to be written.
        folder: Whether it is a folder, which may exist.

    Returns:
        What is wrong, with the path; empty where nothing is known to be.
    """
    path = Path(path).expanduser()
    if "\0" in str(path):
        return f"{str(path)!r} holds a NUL"
    if long := next((part for part in path.parts if len(os.fsencode(part)) > MAX_NAME), ""):
        return f"a name has at most {MAX_NAME} bytes, {long[:40]}... has {len(os.fsencode(long))}"
    try:
        if path.exists() and path.is_dir() is not folder:
            return f"{path} is a {'file' if folder else 'folder'}"
        nearest = next(parent for parent in ((path, *path.parents) if folder else path.parents) if parent.exists())
        if not nearest.is_dir():
            return f"{nearest} is a file"
        if not os.access(nearest, os.W_OK | os.X_OK):
            return f"{nearest} cannot be written to"
        if not folder and path.exists() and not os.access(path, os.W_OK):
            return f"{path} cannot be written to"
        if not folder and path.exists():
            check_regular(path)
    except OSError as error:
        return f"{path}: {error.strerror or error}"
    return ""


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
    with _removed_on_failure(staged):
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
    with unless_empty(path.parent), lock_path(path.with_name(f".{path.name}{LOCK}"), path):
        staged = path.with_name(f".{path.name}.part")
        remove(staged)
        staged.mkdir()
        with _removed_on_failure(staged):
            yield staged
            _sync_folder(staged)
            remove(path)
            staged.replace(path)
        _sync_folder(path.parent)


@contextmanager
def _removed_on_failure(staged: Path) -> Iterator[None]:
    """Remove what is staged where it cannot be completed, as far as that is possible."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove(staged)
        raise


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
