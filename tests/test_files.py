"""Files and folders are replaced completely or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from dvar.files import (
    MAX_BYTES,
    parse_json,
    read_content,
    read_json,
    remove,
    staged_file,
    staged_folder,
    write_atomically,
    write_json,
    writing_problem,
)


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "result.json", b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "result.json", b"new")
    assert (tmp_path / "result.json").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"], "nothing is left of the new one"


def test_json_is_read_back_equal_and_non_finite_numbers_are_refused(tmp_path: Path) -> None:
    value = {"Größe": [1.5, None, "…"]}
    write_json(tmp_path / "value.json", value)
    assert read_json(tmp_path / "value.json") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", float("nan"))
    assert read_json(tmp_path / "value.json") == value


def test_an_error_while_staging_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "sheet.png").write_bytes(b"old")
    with suppress(KeyError), staged_file(tmp_path / "sheet.png") as staged:
        staged.write_bytes(b"new")
        raise KeyError
    assert (tmp_path / "sheet.png").read_bytes() == b"old"


@pytest.mark.parametrize("exists", [False, True])
def test_a_staged_folder_replaces_an_older_one_with_all_of_its_files(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "new" / "samples"
    if exists:
        folder.mkdir(parents=True)
        (folder / "old.png").touch()
    with staged_folder(folder) as staged:
        (staged / "00.png").touch()
        others = {path.name for path in folder.parent.iterdir()} - {staged.name, ".samples.lock"}
        assert others == ({"samples"} if exists else set())
    assert [path.name for path in folder.iterdir()] == ["00.png"]
    assert [path.name for path in folder.parent.iterdir()] == ["samples"]


def test_a_folder_that_is_not_completed_leaves_none_of_those_above_it(tmp_path: Path) -> None:
    with suppress(KeyError), staged_folder(tmp_path / "new" / "deep" / "export") as staged:
        (staged / "weights").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with staged_folder(tmp_path / "new" / "deep" / "export"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "deep", "export"]


def test_a_partly_staged_folder_is_staged_again_from_the_beginning(tmp_path: Path) -> None:
    with suppress(KeyError), staged_folder(tmp_path / "samples") as staged:
        (staged / "left.png").touch()
        raise KeyError
    assert not (tmp_path / "samples").exists()
    with staged_folder(tmp_path / "samples") as staged:
        assert [*staged.iterdir()] == []


def test_files_folders_and_missing_paths_are_removed(tmp_path: Path) -> None:
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with named pipes")
def test_pipes_devices_folders_and_endless_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MAX_BYTES + 1)
    reasons = {"pipe": "a pipe, a device", "large": "more than", ".": "a folder", "a\0b": "a NUL"}
    for name, reason in reasons.items():
        with pytest.raises(OSError, match=reason):
            read_content(tmp_path / name)
    with pytest.raises(OSError, match="a pipe, a device"):
        read_content(Path("/dev/zero"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "[" * 90 + "]" * 90])
def test_json_that_nests_too_deeply_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"it nests too deeply|Expecting value"):
        parse_json(text)


@pytest.mark.parametrize("text", ['["a\\ud800"]', b'{"\\uDC00": 1}', '[["\\udc00\\ud800"]]'])
def test_json_with_half_a_character_is_refused(text: str | bytes) -> None:
    with pytest.raises(ValueError, match="it holds half of a character"):
        parse_json(text)
    assert parse_json(r'["\ud83d\ude00", "\u0000", "\\ud800"]') == ["\U0001f600", "\0", r"\ud800"]


def test_what_keeps_a_file_from_being_written_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert writing_problem(tmp_path / "new" / "folder", folder=True) == writing_problem(tmp_path / "file") == ""
    assert writing_problem(tmp_path / "file", folder=True) == f"{tmp_path / 'file'} is a file"
    assert writing_problem(tmp_path) == f"{tmp_path} is a folder"
    assert writing_problem(tmp_path / "file" / "page.html") == f"{tmp_path / 'file'} is a file"
    assert "has 300" in writing_problem(tmp_path / ("x" * 300))
    assert "NUL" in writing_problem("a\0b")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert writing_problem(tmp_path / "new", folder=True) == f"{tmp_path} cannot be written to"
