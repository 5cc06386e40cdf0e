"""Locks of what is being written; they end with the process that holds them, however it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dvar.errors import FolderInUse

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK = ".lock"
_ATTEMPTS = 100


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder while it is written; it is made where it does not exist, and removed if nothing was written.

    Raises:
        FolderInUse: Another process holds it.
    """
    with unless_empty(folder), lock_path(folder / LOCK, folder):
        yield


@contextmanager
def unless_empty(folder: Path) -> Iterator[None]:
    """Remove a folder that a scope has made, and those above it that it has made too, where they hold nothing."""
    before = next((parent for parent in (folder, *folder.parents) if parent.exists()), folder)
    try:
        yield
    finally:
        with suppress(OSError):  # it holds something
            while folder != before:
                folder.rmdir()
                folder = folder.parent


@contextmanager
def lock_path(path: Path, written: Path) -> Iterator[None]:
    """Hold a lock at ``path``, a file that exists for as long, while ``written`` is written; its folder is made.

    Raises:
        FolderInUse: Another process holds it.
    """
    lock = _open_locked(path, written)
    try:
        lock.write(str(os.getpid()))
        lock.flush()
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            path.unlink()
        lock.close()


def read_holder(path: Path) -> int | None:
    """Return the process that holds the lock at ``path``, and None where nobody does or the system does not say.

    A process that was killed leaves the file behind, and its number may have gone to another one; so the lock itself is
    tried, and only where the file names a process that is alive: nobody who is about to take it is then in the way.
    """
    if sys.platform == "win32":
        return None  # which lets nobody read a locked file
    try:
        with path.open("r", encoding="ascii") as lock:
            process = int(lock.read(20))
            with suppress(PermissionError):  # another user's
                os.kill(process, 0)
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return process
    except (OSError, ValueError, OverflowError):
        return None
    return None


def _open_locked(path: Path, written: Path) -> IO[str]:
    """Return the open file of a lock that this process now holds."""
    while True:
        lock = _open(path)
        try:
            _lock(lock)
        except OSError as error:
            lock.seek(0)
            with suppress(OSError):  # Windows lets nobody read a locked file
                holder = lock.read(20).strip()
            process = f"process {holder}" if holder else "another process"
            lock.close()
            raise FolderInUse([f"{written} is being written by {process}: wait for it, or end it"]) from error
        # Its last holder may have removed the file after it was opened here; then nobody else sees this lock.
        with suppress(OSError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                lock.truncate(0)
                return lock
        lock.close()


def _open(path: Path) -> IO[str]:
    """Open the file of a lock in its folder, which others who hold the lock in turn may remove and make again."""
    for _ in range(_ATTEMPTS):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+", encoding="utf-8")
    return path.open("a+", encoding="utf-8")


def _lock(file: IO[str]) -> None:
    if sys.platform == "win32":
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
