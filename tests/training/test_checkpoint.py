from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dvar.errors import CheckpointError
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import Checkpoint, latest_checkpoint
from dvar.training.run_layout import checkpoint_paths


def checkpoint(step: int) -> Checkpoint:
    trace = Trace({"timesteps": [1, 2]})
    for at in range(step + 1):
        trace.record(at, [0.5 / (at + 1), float("nan") if at == 3 else 0.25], train_loss=at * 0.1)
    tensors = {"method/<thing>": torch.full((2, 3), float(step)), "optimizer/0/step": torch.tensor(float(step))}
    return Checkpoint(step, tensors, {"best_step": step, "config": {"seed": 0}}, trace)


def same(one: Checkpoint, other: Checkpoint) -> bool:
    return (
        one.step == other.step
        and one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        and str(one.trace.records) == str(other.trace.records)
        and one.trace.header == other.trace.header
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = checkpoint(5).write(tmp_path)
    assert path == tmp_path / "checkpoint-5"
    assert same(Checkpoint.read(path), checkpoint(5))
    assert same(latest_checkpoint(tmp_path), checkpoint(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_newest_is_by_step_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        checkpoint(step).write(tmp_path, keep=None if step < 100 else 3)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert latest_checkpoint(tmp_path).step == 100


def test_the_limit_never_deletes_what_was_just_written_for_a_later_one(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        checkpoint(step).write(tmp_path)
    (tmp_path / "checkpoint-12" / "facts.json").write_bytes(b"damaged")
    checkpoint(9).write(tmp_path, keep=1)  # the run went on from 8, since 12 is damaged
    with pytest.warns(UserWarning, match="checkpoint-12 is damaged"):
        assert latest_checkpoint(tmp_path).step == 9
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-12", "checkpoint-9"]


def test_a_step_reached_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    checkpoint(5).write(tmp_path)
    again = Checkpoint(5, {"method/<thing>": torch.ones(1)}, {"best_step": 1}, checkpoint(5).trace)
    again.write(tmp_path)
    assert same(latest_checkpoint(tmp_path), again)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "trace.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str, damage: str) -> None:
    checkpoint(5).write(tmp_path)
    file = checkpoint(6).write(tmp_path) / name
    content = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.write_bytes({"flip": flipped, "cut": content[:-1], "empty": b""}[damage])
    with pytest.raises(CheckpointError, match="checkpoint-6"):
        Checkpoint.read(tmp_path / "checkpoint-6")
    with pytest.warns(UserWarning, match="checkpoint-6 is .* trying the one before"):
        assert same(latest_checkpoint(tmp_path), checkpoint(5))


def test_nothing_whole_to_go_on_from_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path)
    (checkpoint(5).write(tmp_path) / "facts.json").unlink()
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(CheckpointError, match="no whole checkpoint"),
    ):
        latest_checkpoint(tmp_path)


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Make the n-th touch of the disk fail, before it is carried out; the list names the touches so far."""
    touched: list[str] = []
    limit = [0]

    def guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*arguments: Any, **options: Any) -> Any:
            touched.append(name)
            if len(touched) > limit[0]:
                raise Crash
            return call(*arguments, **options)

        return touch

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a real one is slow, and a crash of ours loses no power
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))

    def arm(count: int) -> list[str]:
        limit[0] = count
        touched.clear()
        return touched

    yield arm
    arm(10**9)


@pytest.mark.parametrize("again", [False, True], ids=["new step", "step reached again"])
def test_killed_at_any_write_a_whole_checkpoint_remains(
    tmp_path: Path, crash_at: Callable[[int], list[str]], again: bool
) -> None:
    new = checkpoint(6)
    for allowed in range(1000):
        crash_at(10**9)
        folder = tmp_path / str(allowed)
        checkpoint(5).write(folder)
        if again:
            Checkpoint(6, new.tensors, {"best_step": 0}, new.trace).write(folder)
        touched = crash_at(allowed)
        try:
            new.write(folder, keep=1)
            break
        except Crash:
            crash_at(10**9)
            found = latest_checkpoint(folder)
            assert found.step in (5, 6)
            new.write(folder, keep=1)
        assert same(latest_checkpoint(folder), new)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-6"]
    assert allowed == len(touched) > 10
    assert {"fsync", "replace", "mkdir", "open", "rmtree"} == set(touched)


def test_each_part_is_on_the_disk_before_what_vouches_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose whatever was not synced, and none of the renames that were."""
    done: list[str | int] = []
    fsync, replace = os.fsync, Path.replace

    def synced(handle: int) -> None:
        done.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"renamed {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    final = checkpoint(6).write(tmp_path)
    names: dict[str | int, str] = {path.stat().st_ino: path.name for path in (tmp_path, final, *final.iterdir())}
    assert [names.get(each, each) for each in done] == [
        *("tensors.safetensors", "facts.json"),
        *("trace.jsonl", "renamed trace.jsonl"),
        *("manifest.json", "checkpoint-6"),
        *("renamed checkpoint-6", tmp_path.name),
    ]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = checkpoint(5).write(tmp_path)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".jsonl", ".safetensors"]
    assert json.loads((folder / "facts.json").read_text())["best_step"] == 5
