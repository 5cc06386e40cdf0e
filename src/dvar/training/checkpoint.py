"""Checkpoints: a folder that is either complete or not there, checked again when it is read.

A checkpoint holds everything its run needs to go on: what is trained, the optimizer's state, the best step so far, the
settings, and the trace up to its step.  Tensors are in safetensors, the rest in JSON; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dvar.errors import CheckpointError, TraceError
from dvar.stopping.trace import Trace

MANIFEST = "manifest.json"
TENSORS, FACTS, TRACE = "tensors.safetensors", "facts.json", "trace.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was after ``step`` updates; ``facts`` are plain JSON."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    trace: Trace

    @property
    def state(self) -> dict[str, Tensor]:
        """What the method had learned."""
        prefix = "method/"
        return {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}

    def write(self, folder: Path, keep: int | None = None) -> Path:
        """Return ``folder``/checkpoint-N once it is complete and on the disk; then delete older ones.

        Of those up to its step the ``keep`` newest are left, itself among them.  The files are written beside it, the
        manifest with their digests last, and one rename makes them a checkpoint: killed at any moment, this leaves
        every earlier checkpoint as it was.
        """
        final, staged = folder / f"checkpoint-{self.step}", folder / f".checkpoint-{self.step}.part"
        _remove(staged)
        staged.mkdir(parents=True)
        _write(staged / TENSORS, save(dict(self.tensors)))
        _write(staged / FACTS, json.dumps({"step": self.step, **self.facts}, indent=1).encode())
        self.trace.write(staged / TRACE)
        digests = {name: _digest(staged / name) for name in (TENSORS, FACTS, TRACE)}
        _write(staged / MANIFEST, json.dumps(digests, indent=1).encode())
        _sync(staged)
        _remove(final)  # of a step reached again; the checkpoint that the run went on from is still there
        staged.replace(final)
        _sync(folder)
        # Later ones are of a run that went on from before them: damaged perhaps, and none to count on.
        for old in [path for path in saved(folder) if _step(path) <= self.step][keep:] if keep else ():
            _remove(old)
        return final

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Return the checkpoint at ``path``.

        Raises: CheckpointError when it is not whole: a file is missing, or is not what was written.
        """
        try:
            digests = json.loads((path / MANIFEST).read_bytes())
            contents = {name: (path / name).read_bytes() for name in (TENSORS, FACTS, TRACE)}
            damaged = [name for name, content in contents.items() if sha256(content).hexdigest() != digests[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a whole checkpoint ({error}): name another, or 'latest'") from error
        if damaged:
            raise CheckpointError(f"{path} is damaged ({', '.join(damaged)} changed): name another, or 'latest'")
        try:
            facts = json.loads(contents[FACTS])
            return cls(facts.pop("step"), load(contents[TENSORS]), facts, Trace.read(path / TRACE))
        except (ValueError, KeyError, SafetensorError, TraceError) as error:
            raise CheckpointError(f"{path} holds no checkpoint of ours ({error}): name another, or 'latest'") from error


def latest(folder: Path) -> Checkpoint:
    """Return the newest whole checkpoint in ``folder``, with a warning for each newer one that is damaged.

    Raises: CheckpointError when there is none.
    """
    for path in saved(folder):
        try:
            return Checkpoint.read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; going back to the one before", stacklevel=2)
    raise CheckpointError(f"{folder} holds no whole checkpoint to go on from: start afresh with --overwrite")


def saved(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, newest step first, whole or not."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system can (Windows cannot, and does not need to)."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
