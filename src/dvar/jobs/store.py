"""The folder of a job's run: on this machine, on a shared disk, or behind a URL of fsspec."""

# Behind a URL the run is written into a folder of the worker's machine, fetched before it and pushed at each checkpoint
# and at the end.  What says whose the other files are, job.json and config.json, is pushed first, and what makes them
# count, the manifest of a checkpoint and result.json, last; they are removed the other way round.
#
# No file system of fsspec locks a folder for all machines.  So a worker claims a run by a mark in its job.json, and the
# last claim counts: a worker that was taken for lost pushes nothing more once another one has claimed its run.  What
# remains is a push in whose middle the other claims it.  Both write the same job then, a checkpoint of which each has
# written a part is known by its manifest and passed over, and neither removes what only the other has written.

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from dvar.errors import FolderInUse, RefusedInput, first_line
from dvar.files import MAX_BYTES, parse_json, read_json, remove, write_json
from dvar.jobs.job import JOB, is_url
from dvar.locks import LOCK, lock_path
from dvar.schema import find_mismatch
from dvar.training.checkpoint import MANIFEST
from dvar.training.run_layout import CONFIG, RESULT

_FIRST, _LAST = (JOB, CONFIG), (MANIFEST, RESULT)
_TEMPORARY = "dvar-job-"
_FETCHES = 5
"""How often a run is listed that changes while it is fetched."""


def url_problems(folder: str) -> list[str]:
    """Return what is wrong with a folder behind a URL: its file system is not installed, or cannot be written."""
    try:
        system, root = open_url(folder)
        system.makedirs(root, exist_ok=True)
        system.pipe_file(f"{root}/.dvar-batch", b"")
        system.rm_file(f"{root}/.dvar-batch")
    except RefusedInput as error:
        return list(error.problems)
    except Exception as error:  # each file system has errors of its own
        return [f"output_dir must be a folder that can be written, and {folder} cannot ({first_line(error)}): check it"]
    return []


def read_run_json(folder: str, name: str, schema: Any = dict) -> Any:
    """Return what a JSON file in a run's folder holds; None where it is missing, damaged or differs from ``schema``."""
    with suppress(OSError, ValueError):
        if not is_url(folder):
            return read_json(Path(folder).expanduser() / name, schema)
        system, root = open_url(folder)
        value = parse_json(system.cat_file(f"{root}/{name}", end=MAX_BYTES))
        return None if find_mismatch(value, schema) else value
    return None


@contextmanager
def run_folder(folder: str, name: str) -> Iterator[RunStore]:
    """Yield the store of a run's folder; what is behind a URL is fetched first, and removed here at last.

    Args:
        folder: The folder.
        name: The name of the job, which a folder of this machine has too: the hub calls a run by its folder.

    Raises:
        FolderInUse: What is behind the URL changes all the time.
    """
    if not is_url(folder):
        yield RunStore(Path(folder).expanduser())
        return
    with _temporary_folder() as local:
        store = RemoteStore(local / name, folder)
        store.fetch()
        yield store


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yield a new folder that this process alone uses; those of workers that were killed are removed before it."""
    root = Path(tempfile.gettempdir())
    for left in (path for path in root.glob(f"{_TEMPORARY}*") if path.is_dir()):
        with suppress(OSError, FolderInUse), lock_path(_lock_of(left), left):  # another user's, or a living worker's
            remove(left)
    folder = root / f"{_TEMPORARY}{secrets.token_hex(8)}"
    with lock_path(_lock_of(folder), folder):
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            remove(folder)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


class RunStore:
    """The folder that a run is written into.

    Args:
        folder: The folder on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, facts: Mapping[str, str]) -> None:
        """Write which job the run is of; from now on no other worker pushes into where it is stored."""
        write_json(self.folder / JOB, facts)

    def push(self) -> None:
        """Bring what is new to where the run is stored: it is there already."""


class RemoteStore(RunStore):
    """A folder of this machine whose content is stored behind a URL.

    Args:
        folder: The folder on this machine.
        url: The folder behind a URL.
    """

    def __init__(self, folder: Path, url: str) -> None:
        super().__init__(folder)
        self.url = url
        self.system, self.root = open_url(url)
        self._pushed: dict[str, tuple[int, int]] = {}
        self._worker = ""

    def fetch(self) -> None:
        """Fetch the run as it is stored.

        Raises:
            FolderInUse: It has changed each time while it was fetched.
        """
        for _ in range(_FETCHES):
            try:
                self._fetch_listed()
                return
            except FileNotFoundError as error:
                change = first_line(error)
        message = f"{self.url} must not change while it is fetched, and a file that was listed is gone ({change})"
        raise FolderInUse([f"{message}: end the other worker that writes it, or wait for it"])

    def claim(self, facts: Mapping[str, str]) -> None:
        """Write which job the run is of, and store it at once, with a mark by which other workers lose the run."""
        self._worker = secrets.token_hex(8)
        super().claim({**facts, "worker": self._worker})
        self._put(JOB)

    def push(self) -> None:
        """Store what is new or changed, and then remove what is here no more, as far as it was fetched or stored here.

        Raises:
            RefusedInput: Another worker has claimed the run.
        """
        if self._worker and self._worker != self._read_claim():
            rule = f"one worker writes a run, and another has taken over the one in {self.url}"
            raise RefusedInput([f"{rule}: let it end, or start the batch again once it is lost"])
        # Locks hold on this machine alone.
        files = (path for path in self.folder.rglob("*") if path.is_file() and not path.name.endswith(LOCK))
        names = {path.relative_to(self.folder).as_posix(): path for path in files}
        changed = [name for name, path in names.items() if self._pushed.get(name) != _stamp(path)]
        for name in sorted(changed, key=_rank):
            self._put(name)
        for name in sorted(self._pushed.keys() - names.keys(), key=_rank, reverse=True):
            with suppress(FileNotFoundError):
                self.system.rm_file(f"{self.root}/{name}")
            del self._pushed[name]
            self._remove_empty_folders(name)

    def _fetch_listed(self) -> None:
        """Fetch what is stored now; raise a FileNotFoundError if a part of it is removed meanwhile."""
        remove(self.folder)
        self.folder.mkdir(parents=True)
        self._pushed.clear()
        self.system.invalidate_cache()
        paths: list[str] = []
        with suppress(FileNotFoundError):  # there is no run yet
            paths = self.system.find(self.root)
        for path in paths:
            name = path.removeprefix(self.root).lstrip("/")
            target = self.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            self.system.get_file(path, str(target))
            self._pushed[name] = _stamp(target)

    def _read_claim(self) -> str:
        """Return the mark of the worker that has claimed the run last; empty if its job.json is gone or damaged."""
        with suppress(FileNotFoundError, ValueError):
            claim = parse_json(self.system.cat_file(f"{self.root}/{JOB}"))
            return str(claim.get("worker")) if isinstance(claim, dict) else ""
        return ""

    def _put(self, name: str) -> None:
        """Store a file."""
        path, target = self.folder / name, f"{self.root}/{name}"
        stamp = _stamp(path)
        self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
        self.system.put_file(str(path), target)
        self._pushed[name] = stamp

    def _remove_empty_folders(self, name: str) -> None:
        """Remove the folders of a file that was removed where they are empty: object stores have no such folders."""
        for folder in PurePosixPath(name).parents[:-1]:
            with suppress(Exception):  # it holds something, or there is none: each file system has errors of its own
                self.system.rmdir(f"{self.root}/{folder}")


def _rank(name: str) -> int:
    """Return when a file is stored: 0 before others, 1 among them, 2 after them."""
    own_name = PurePosixPath(name).name
    return 0 if name in _FIRST else 2 if own_name in _LAST else 1


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def open_url(folder: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        RefusedInput: The file system is unknown or not installed.
    """
    from fsspec.core import url_to_fs

    try:
        system, root = url_to_fs(folder)
    except (ImportError, ValueError) as error:
        rule = f"output_dir must be a folder or a URL that fsspec knows, got {folder}"
        raise RefusedInput([f"{rule} ({first_line(error)}): install its package, such as s3fs or gcsfs"]) from error
    return system, str(root).rstrip("/")
