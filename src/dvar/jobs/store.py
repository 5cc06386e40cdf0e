"""The folder of a job's run: on this machine, on a shared disk, or behind a URL of fsspec."""

# Behind a URL the run is written into a folder of the worker's machine, fetched before it and pushed at each checkpoint
# and at the end.  What makes other files count, the manifest of a checkpoint and result.json, is pushed last.

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput, first_line
from dvar.files import read_json
from dvar.training.checkpoint import MANIFEST
from dvar.training.run_layout import RESULT

_LAST = (MANIFEST, RESULT)


def is_url(folder: str) -> bool:
    """Return whether a folder is behind a URL."""
    return "://" in folder


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


def read_run_json(folder: str, name: str) -> Any:
    """Return what a JSON file in a run's folder holds; None where it is missing or damaged."""
    with suppress(OSError, ValueError):
        if not is_url(folder):
            return read_json(Path(folder).expanduser() / name)
        system, root = open_url(folder)
        return json.loads(system.cat_file(f"{root}/{name}"))
    return None


@contextmanager
def run_folder(folder: str) -> Iterator[RunStore]:
    """Yield the store of a run's folder; what is behind a URL is fetched first, and removed here at last."""
    if not is_url(folder):
        yield RunStore(Path(folder).expanduser())
        return
    local = Path(tempfile.gettempdir()) / "dvar-jobs" / sha256(folder.encode()).hexdigest()[:16]
    shutil.rmtree(local, ignore_errors=True)
    store = RemoteStore(local, folder)
    try:
        store.fetch()
        yield store
    finally:
        shutil.rmtree(local, ignore_errors=True)


class RunStore:
    """The folder that a run is written into.

    Args:
        folder: The folder on this machine.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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
        self.system, self.root = open_url(url)
        self._pushed: dict[str, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Fetch the run as it is stored."""
        self.folder.mkdir(parents=True)
        with suppress(FileNotFoundError):
            for path in self.system.find(self.root):
                name = path.removeprefix(self.root).lstrip("/")
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                self.system.get_file(path, str(target))
                self._pushed[name] = _stamp(target)

    def push(self) -> None:
        """Store what is new or changed, and then remove what is here no more."""
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        stamps = {name: _stamp(path) for name, path in files.items()}
        changed = [name for name, stamp in stamps.items() if self._pushed.get(name) != stamp]
        for name in sorted(changed, key=lambda name: Path(name).name in _LAST):
            target = f"{self.root}/{name}"
            self.system.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.system.put_file(str(files[name]), target)
        # A folder that has lost all its files goes as a whole: some file systems would leave it empty.
        folders = {name.rpartition("/")[0] for name in stamps}
        lost = {name.rpartition("/")[0] for name in self._pushed} - folders
        files_lost = {name for name in self._pushed.keys() - stamps.keys() if name.rpartition("/")[0] in folders}
        for name in (*lost, *files_lost):
            with suppress(FileNotFoundError):
                self.system.rm(f"{self.root}/{name}", recursive=name in lost)
        self._pushed = stamps


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
