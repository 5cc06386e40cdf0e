"""Locks of what is being written: one process at a time, released by any death, and no trace left."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dvar.errors import RefusedInput
from dvar.files import staged_folder
from dvar.locks import LOCK, lock_folder, read_holder

HOLD = """
import sys
from pathlib import Path
from dvar.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
TAKE_TURNS = """
import os, sys
from pathlib import Path
from dvar.errors import RefusedInput
from dvar.locks import lock_folder
folder, turns = Path(sys.argv[1]), 0
while turns < 30:
    try:
        with lock_folder(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            (folder / "inside").unlink()
            turns += 1
    except RefusedInput:
        pass
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Yield a process that holds a folder until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_another_process_writes_is_refused_by_its_number(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "run") as holder:
        for _ in range(2):  # being refused takes nothing from the holder
            with pytest.raises(RefusedInput) as refused, lock_folder(tmp_path / "run"):
                pass
            message = f"{tmp_path / 'run'} is being written by process {holder.pid}: wait for it, or end it"
            assert str(refused.value) == message


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    with held_by_another(tmp_path / "run") as holder:
        holder.kill()
        holder.wait()
        assert (tmp_path / "run" / LOCK).read_text() == str(holder.pid)
        with lock_folder(tmp_path / "run"):
            pass
    assert not (tmp_path / "run" / LOCK).exists()


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "runs" / "mug"):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    with pytest.raises(KeyError), lock_folder(tmp_path / "mine"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    with lock_folder(tmp_path / "run"):
        (tmp_path / "run" / "trace.jsonl").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trace.jsonl"]


@pytest.mark.slow
def test_never_are_two_inside(tmp_path: Path) -> None:
    """Each holder removes the lock's file, so that the others may have opened one that nobody else will see."""
    words = [sys.executable, "-c", TAKE_TURNS, str(tmp_path / "run")]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors


def test_a_folder_that_is_being_filled_is_not_filled_by_another(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "export") as staged:
        (staged / "weights").touch()
        with pytest.raises(RefusedInput, match="is being written"), staged_folder(tmp_path / "export"):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "weights"]


def test_the_process_of_another_user_holds_its_lock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(process: int, signal: int) -> None:
        raise PermissionError

    with held_by_another(tmp_path / "run") as holder, monkeypatch.context() as patch:
        patch.setattr("os.kill", refuse)
        assert read_holder(tmp_path / "run" / LOCK) == holder.pid
    assert read_holder(tmp_path / "run" / LOCK) is None
