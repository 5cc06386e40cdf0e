"""Checkpoints: written atomically, verified when read, limited in number."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dvar.errors import CheckpointError
from dvar.files import read_content
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import Checkpoint, latest_checkpoint
from dvar.training.run_layout import checkpoint_paths


def build_checkpoint(step: int) -> Checkpoint:
    trace = Trace({"timesteps": [1, 2]})
    for at in range(step + 1):
        trace.record(at, [0.5 / (at + 1), float("nan") if at == 3 else 0.25], train_loss=at * 0.1)
    tensors = {"method/<thing>": torch.full((2, 3), float(step)), "optimizer/0/step": torch.tensor(float(step))}
    return Checkpoint(step, tensors, {"best_step": step, "config": {"seed": 0}}, trace)


def equal_checkpoints(first: Checkpoint, second: Checkpoint) -> bool:
    return (
        first.step == second.step
        and first.facts == second.facts
        and first.tensors.keys() == second.tensors.keys()
        and all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
        and str(first.trace.records) == str(second.trace.records)
        and first.trace.header == second.trace.header
    )


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    path = build_checkpoint(5).write(tmp_path)
    assert path == tmp_path / "checkpoint-5"
    assert equal_checkpoints(Checkpoint.read(path), build_checkpoint(5))
    assert equal_checkpoints(latest_checkpoint(tmp_path), build_checkpoint(5))
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


def test_weights_of_any_size_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = build_checkpoint(5)
    large = replace(checkpoint, tensors={**checkpoint.tensors, "best/<thing>": torch.rand(100, 100)})
    path = large.write(tmp_path)
    monkeypatch.setattr(read_content, "__defaults__", (10_000,))  # in place of a gibibyte of text
    with pytest.raises(OSError, match="it has more than 10000 bytes"):
        read_content(path / "tensors.safetensors")
    assert equal_checkpoints(Checkpoint.read(path), large)


def test_the_newest_is_the_highest_step_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        build_checkpoint(step).write(tmp_path, keep=None if step < 100 else 3)
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    assert latest_checkpoint(tmp_path).step == 100


def test_the_limit_never_deletes_the_checkpoint_just_written(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        build_checkpoint(step).write(tmp_path)
    (tmp_path / "checkpoint-12" / "facts.json").write_bytes(b"damaged")
    build_checkpoint(9).write(tmp_path, keep=1)  # the run resumed from 8, since 12 is damaged
    with pytest.warns(UserWarning, match="checkpoint-12 is damaged"):
        assert latest_checkpoint(tmp_path).step == 9
    assert [path.name for path in checkpoint_paths(tmp_path)] == ["checkpoint-12", "checkpoint-9"]


def test_a_step_reached_again_replaces_its_checkpoint(tmp_path: Path) -> None:
    build_checkpoint(5).write(tmp_path)
    replacement = Checkpoint(5, {"method/<thing>": torch.ones(1)}, {"best_step": 1}, build_checkpoint(5).trace)
    replacement.write(tmp_path)
    assert equal_checkpoints(latest_checkpoint(tmp_path), replacement)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-5"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json", "trace.jsonl", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_detected_and_the_previous_checkpoint_is_used(tmp_path: Path, name: str, damage: str) -> None:
    build_checkpoint(5).write(tmp_path)
    file = build_checkpoint(6).write(tmp_path) / name
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
        assert equal_checkpoints(latest_checkpoint(tmp_path), build_checkpoint(5))


def test_resuming_without_an_intact_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        latest_checkpoint(tmp_path)
    (build_checkpoint(5).write(tmp_path) / "facts.json").unlink()
    with (
        pytest.warns(UserWarning, match="trying the one before"),
        pytest.raises(CheckpointError, match="no whole checkpoint"),
    ):
        latest_checkpoint(tmp_path)


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture
def crash_at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Raise at the n-th access to the disk, before it is carried out; the list names the accesses so far."""
    touches: list[str] = []
    limit = [0]

    def guarded(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def touch(*arguments: Any, **options: Any) -> Any:
            touches.append(name)
            if len(touches) > limit[0]:
                raise Crash
            return call(*arguments, **options)

        return touch

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # a real one is slow, and this crash is no power cut
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "mkdir"), (Path, "open"), (shutil, "rmtree")):
        monkeypatch.setattr(owner, name, guarded(name, getattr(owner, name)))

    def arm(count: int) -> list[str]:
        limit[0] = count
        touches.clear()
        return touches

    yield arm
    arm(10**9)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new step", "step reached again"])
def test_an_intact_checkpoint_remains_after_a_crash_at_any_write(
    tmp_path: Path, crash_at: Callable[[int], list[str]], overwrite: bool
) -> None:
    replacement = build_checkpoint(6)
    for limit in range(1000):
        crash_at(10**9)
        folder = tmp_path / str(limit)
        build_checkpoint(5).write(folder)
        if overwrite:
            Checkpoint(6, replacement.tensors, {"best_step": 0}, replacement.trace).write(folder)
        touches = crash_at(limit)
        try:
            replacement.write(folder, keep=1)
            break
        except Crash:
            crash_at(10**9)
            newest = latest_checkpoint(folder)
            assert newest.step in (5, 6)
            replacement.write(folder, keep=1)
        assert equal_checkpoints(latest_checkpoint(folder), replacement)
        assert [path.name for path in folder.iterdir()] == ["checkpoint-6"]
    assert limit == len(touches) > 10
    assert {"fsync", "replace", "mkdir", "open", "rmtree"} == set(touches)


def test_each_file_is_synced_before_the_manifest_that_lists_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut may lose whatever was not synced, and none of the renames that were."""
    events: list[str | int] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def record_rename(path: Path, target: Path) -> Path:
        events.append(f"renamed {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_rename)
    final = build_checkpoint(6).write(tmp_path)
    names: dict[str | int, str] = {path.stat().st_ino: path.name for path in (tmp_path, final, *final.iterdir())}
    assert [names.get(event, event) for event in events] == [
        *("tensors.safetensors", "facts.json"),
        *("trace.jsonl", "renamed trace.jsonl"),
        *("manifest.json", "checkpoint-6"),
        *("renamed checkpoint-6", tmp_path.name),
    ]


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = build_checkpoint(5).write(tmp_path)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", ".jsonl", ".safetensors"]
    assert json.loads((folder / "facts.json").read_text())["best_step"] == 5
