"""Damage to the files of a command: what disks, people and other programs do to them."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

DEEP = 3000  # objects or lists inside one another
JSON_VALUES = (
    *("null", "true", "[]", "{}", '""', '"x"', "-1", "0", "3", "1.5", "NaN", "Infinity", "1e400", f"1{'0' * 400}"),
    *("9" * 5000, '"\\ud800"', '"a\\u0000b"', '"\\u001b[2J"', '"../../x"', '"/dev/zero"', f'"{"x" * 5000}"'),
    *(f"{'[' * DEEP}{']' * DEEP}", '{"a":' * DEEP + "1" + "}" * DEEP, '[[1, "a"], {"b": null}]', '{"step": 1}'),
)
"""Values that no program of ours writes where they are put, as texts of JSON."""


@dataclass(frozen=True)
class Damage:
    """One way to damage a file.

    Attributes:
        path: The file, relative to the folder of all files.
        kind: A name in `KINDS`.
        seed: Decides where and how.
    """

    path: str
    kind: str
    seed: int

    def apply(self, folder: Path) -> None:
        """Damage the file in ``folder``."""
        KINDS[self.kind](folder / self.path, Random(self.seed))


def _delete(path: Path, random: Random) -> None:
    path.unlink()


def _empty(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def _cut(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content) + 1)])


def _flip(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(random.choice((1, 1, 20))):
        content[random.randrange(len(content))] = random.randrange(256)
    path.write_bytes(content)


def _scramble(path: Path, random: Random) -> None:
    path.write_bytes(random.randbytes(random.choice((1, 50, 5000))))


def _replace_text(path: Path, random: Random) -> None:
    path.write_text(random.choice(JSON_VALUES), encoding="utf-8")


def _be_folder(path: Path, random: Random) -> None:
    path.unlink()
    path.mkdir()


def _be_pipe(path: Path, random: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def _be_socket(path: Path, random: Random) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _link(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to(random.choice((path.name, "/dev/zero", "/dev/null", "nowhere", "/proc/self/mem", ".")))


def _be_endless(path: Path, random: Random) -> None:
    os.truncate(path, 2**40)  # a hole, which takes no room


def _change_json(path: Path, random: Random) -> None:
    """Put a value of another shape somewhere into a JSON document or one of its lines, or take a name away."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    whole = path.suffix != ".jsonl"
    index = 0 if whole or not lines else random.randrange(len(lines))
    try:
        value = json.loads("\n".join(lines) if whole else lines[index])
    except (ValueError, IndexError):
        return _replace_text(path, random)
    text = json.dumps(_plant(value, random))
    for number, planted in enumerate(JSON_VALUES):
        text = text.replace(f'"planted {number}"', planted)
    lines = [text] if whole else [*lines[:index], text, *lines[index + 1 :]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


def _plant(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value in which one value at any depth is another, or is missing."""
    names: list[Any] = (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )
    if not names or random.random() < 0.15:
        return f"planted {random.randrange(len(JSON_VALUES))}"
    name = random.choice(names)
    copy = value.copy()
    if random.random() < 0.15:
        del copy[name]
    elif isinstance(copy, dict) and random.random() < 0.1:
        copy[random.choice(("self", "a\0b", "", "path", "\x1b[2J"))] = copy.pop(name)
    else:
        copy[name] = _plant(value[name], random)
    return copy


KINDS: dict[str, Callable[[Path, Random], None]] = {
    "delete": _delete,
    "empty": _empty,
    "cut": _cut,
    "flip": _flip,
    "scramble": _scramble,
    "text": _replace_text,
    "folder": _be_folder,
    "pipe": _be_pipe,
    "socket": _be_socket,
    "link": _link,
    "endless": _be_endless,
    "json": _change_json,
}


def list_entries(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return everything in a folder by its path, as (kind and mode, size, time of change)."""
    entries = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            status = os.lstat(os.path.join(root, name))
            size = 0 if name in folders else status.st_size
            entries[os.path.relpath(os.path.join(root, name), folder)] = (status.st_mode, size, status.st_mtime_ns)
    return {
        name: (mode, size, 0 if os.path.isdir(folder / name) else time) for name, (mode, size, time) in entries.items()
    }


class Workspace:
    """A folder of valid files, to which it can be restored."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        self.folders = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir()}
        self.entries = list_entries(folder)

    @property
    def files(self) -> list[str]:
        """All files, relative to the folder."""
        return sorted(self.contents)

    def restore(self) -> None:
        """Undo everything that happened in the folder."""
        if (now := list_entries(self.folder)) == self.entries:
            return
        for name in sorted(now, reverse=True):
            if name not in self.entries or now[name][0] != self.entries[name][0]:
                path = self.folder / name
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for name in sorted(self.folders):
            (self.folder / name).mkdir(exist_ok=True)
        for name, content in self.contents.items():
            if now.get(name) != self.entries[name]:
                (self.folder / name).write_bytes(content)
        self.entries = list_entries(self.folder)
