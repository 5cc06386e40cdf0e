"""A write, fsync or rename of a run fails, or the disk is full: the run reports it and resumes bit for bit."""

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
from short_run import Outcome, resume_run

from dvar.config.methods import TextualInversionConfig
from dvar.errors import OutOfResources
from dvar.training.personalise import personalise
from dvar.training.run_layout import checkpoint_paths


class CountedFile:
    """A file that reports every write before it is carried out."""

    def __init__(self, file: Any, count_access: Callable[[], None]) -> None:
        self._file, self._count_access = file, count_access

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: Any) -> int:
        self._count_access()
        return int(self._file.write(content))


class Disk:
    """A counter of the accesses of one kind ("write", "fsync" or "rename") under a folder.

    Access number ``failing_call`` fails, and where ``full`` all later ones too.
    """

    def __init__(
        self, patch: pytest.MonkeyPatch, kind: str, folder: Path, failing_call: int, full: bool = False
    ) -> None:
        self.kind, self.folder, self.failing_call, self.full, self.count = kind, str(folder), failing_call, full, 0
        original_open, fsync, replace = io.open, os.fsync, os.replace

        def open(name: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            file = original_open(name, mode, *rest, **options)
            in_folder = isinstance(name, str | Path) and str(name).startswith(self.folder)
            return CountedFile(file, lambda: self.count_access("write")) if in_folder and mode[0] in "wax" else file

        patch.setattr(io, "open", open)
        patch.setattr(builtins, "open", open)

        def counted_fsync(handle: int) -> None:
            self.count_access("fsync")
            fsync(handle)

        def counted_replace(source: Any, target: Any, **options: Any) -> None:
            self.count_access("rename")
            replace(source, target, **options)

        patch.setattr(os, "fsync", counted_fsync)
        patch.setattr(os, "replace", counted_replace)

    def count_access(self, kind: str) -> None:
        if kind != self.kind:
            return
        self.count += 1
        if self.count == self.failing_call or (self.full and self.count > self.failing_call):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.folder)


def run_with_failing_disk(config: TextualInversionConfig, kind: str, failing_call: int, full: bool = False) -> Disk:
    """Run until disk access number ``failing_call`` fails, and return the disk."""
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, kind, Path(config.output_dir), failing_call, full)
        with pytest.raises(OutOfResources, match=r"No space left on device.*make room or repair it, then ") as refused:
            personalise(config)
    resumable = checkpoint_paths(Path(config.output_dir))
    remedy = "go on with --resume_from_checkpoint latest" if resumable else "start the run again"
    assert str(refused.value).endswith(remedy)
    return disk


def count_calls(config: TextualInversionConfig, kind: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, kind, Path(config.output_dir), 0)
        personalise(config)
    return disk.count


KINDS = ("write", "fsync", "rename")
# Chosen to fall before the first checkpoint, into checkpoints, between them, and into the exports.
FEW = {"write": (44, 61), "fsync": (13, 31), "rename": (1, 8)}


pytestmark = pytest.mark.usefixtures("cached_model")


@pytest.mark.parametrize(
    ("kind", "failing_call"), [(kind, failing_call) for kind in KINDS for failing_call in FEW[kind]]
)
def test_a_run_resumes_after_a_failed_disk_access(
    config: TextualInversionConfig, reference: Outcome, kind: str, failing_call: int
) -> None:
    assert run_with_failing_disk(config, kind, failing_call).count == failing_call
    assert resume_run(config) == reference


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_after_any_failed_disk_access(
    config: TextualInversionConfig, reference: Outcome, kind: str, tmp_path: Path
) -> None:
    total = count_calls(config, kind)
    assert total > 12
    for failing_call in range(1, total + 1):
        settings = replace(config, output_dir=str(tmp_path / f"run-{failing_call}"))
        assert run_with_failing_disk(settings, kind, failing_call).count == failing_call
        assert resume_run(settings) == reference, f"{kind} {failing_call} of {total}"


def test_a_disk_that_stays_full_leaves_the_last_checkpoint(config: TextualInversionConfig, reference: Outcome) -> None:
    run_with_failing_disk(config, "write", 62, full=True)
    assert [path.name for path in checkpoint_paths(Path(config.output_dir))][-1] == "checkpoint-0"
    assert resume_run(config) == reference
