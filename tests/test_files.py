"""Files and folders are replaced completely or not at all."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from dvar.files import read_json, remove, staged_file, staged_folder, write_atomically, write_json


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "result.json", b"old")
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "result.json", b"new")
    assert (tmp_path / "result.json").read_bytes() == b"old"
    assert (tmp_path / "result.json.part").read_bytes() == b"new", "it was complete before it was synced"


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
