"""Each i-th write, fsync and rename of a run fails, or the disk is full: the run says so, and goes on as if never."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from short_run import Outcome, gone_on

from dvar.config.training import TextualInversionConfig
from dvar.errors import OutOfResources
from dvar.training.personalise import personalise
from dvar.training.run_layout import checkpoint_paths


class Touched:
    """A file whose every write asks first."""

    def __init__(self, file: Any, ask: Callable[[], None]) -> None:
        self._file, self._ask = file, ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Touched:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        self._ask()
        return int(self._file.write(content))


class Disk:
    """Counts the touches of one kind ("write", "fsync" or "rename") under a folder; the one numbered ``fails`` fails,
    and where ``full`` all after it too.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: str, folder: Path, fails: int, full: bool = False) -> None:
        self.kind, self.folder, self.fails, self.full, self.count = kind, str(folder), fails, full, 0
        opened, fsync, replace = io.open, os.fsync, os.replace

        def open(name: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = opened(name, mode, *rest, **options)
            ours = isinstance(name, str | Path) and str(name).startswith(self.folder)
            return Touched(file, lambda: self.ask("write")) if ours and mode[0] in "wax" else file

        patch.setattr(io, "open", open)
        patch.setattr(builtins, "open", open)

        def asking_fsync(handle: int) -> None:
            self.ask("fsync")
            fsync(handle)

        def asking_replace(source: Any, target: Any, **options: Any) -> None:
            self.ask("rename")
            replace(source, target, **options)

        patch.setattr(os, "fsync", asking_fsync)
        patch.setattr(os, "replace", asking_replace)

    def ask(self, kind: str) -> None:
        if kind != self.kind:
            return
        self.count += 1
        if self.count == self.fails or (self.full and self.count > self.fails):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder)


def broken(config: TextualInversionConfig, kind: str, fails: int, full: bool = False) -> Disk:
    """The disk of a run whose touch number ``fails`` failed."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, kind, Path(config.output_dir), fails, full)
        with pytest.raises(OutOfResources, match=r"No space left on device.*go on with --resume_from_checkpoint"):
            personalise(config)
    return disk


def touches(config: TextualInversionConfig, kind: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, kind, Path(config.output_dir), 0)
        personalise(config)
    return disk.count


KINDS = ("write", "fsync", "rename")
# Chosen to fall before the first checkpoint, into checkpoints, between them, and into the exports.
FEW = {"write": (44, 61), "fsync": (13, 31), "rename": (1, 8)}


pytestmark = pytest.mark.usefixtures("loaded_at_once")


@pytest.mark.parametrize(("kind", "fails"), [(kind, fails) for kind in KINDS for fails in FEW[kind]])
def test_a_touch_of_the_disk_fails_and_the_run_goes_on(
    config: TextualInversionConfig, straight: Outcome, kind: str, fails: int
) -> None:
    assert broken(config, kind, fails).count == fails
    assert gone_on(config) == straight


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_touch_of_the_disk_may_fail(
    config: TextualInversionConfig, straight: Outcome, kind: str, tmp_path: Path
) -> None:
    total = touches(config, kind)
    assert total > 12
    for fails in range(1, total + 1):
        each = replace(config, output_dir=str(tmp_path / f"run-{fails}"))
        assert broken(each, kind, fails).count == fails
        assert gone_on(each) == straight, f"{kind} {fails} of {total}"


def test_a_disk_that_stays_full_leaves_the_last_checkpoint(config: TextualInversionConfig, straight: Outcome) -> None:
    broken(config, "write", 62, full=True)
    assert [path.name for path in checkpoint_paths(Path(config.output_dir))][-1] == "checkpoint-0"
    assert gone_on(config) == straight
