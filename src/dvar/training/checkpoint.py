"""Checkpoints of a run: written whole or not at all, and verified when they are read."""

from __future__ import annotations

import json
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
from dvar.files import parse_json, read_content, read_json, remove, staged_folder, write_synced
from dvar.schema import find_mismatch
from dvar.stopping.trace import Trace
from dvar.training.run_layout import TRACE, checkpoint_name, checkpoint_paths, checkpoint_step
from dvar.training.run_schemas import CHECKPOINT_FACTS, MANIFEST_DIGESTS

MANIFEST = "manifest.json"
TENSORS, FACTS = "tensors.safetensors", "facts.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run as it was after ``step`` updates, with everything it needs to continue.

    On disk the tensors are safetensors and the rest is JSON; nothing is ever unpickled.

    Attributes:
        step: Updates made.
        tensors: What is trained, the optimizer's state and the best step so far, by name.
        facts: The config and everything else that is plain JSON.
        trace: The trace up to ``step``.
    """

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    trace: Trace

    @property
    def state(self) -> dict[str, Tensor]:
        """The state of the method."""
        prefix = "method/"
        return {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}

    def write(self, folder: Path, keep: int | None = None) -> Path:
        """Write the checkpoint into ``folder`` and return its path, once it is complete and on the disk.

        The files are staged beside it, the manifest with their digests last, and one rename makes them a checkpoint:
        a process killed at any moment leaves every earlier checkpoint as it was.

        Args:
            folder: The folder of the run.
            keep: How many of the newest checkpoints up to this step to keep, this one included; by default all.
        """
        path = folder / checkpoint_name(self.step)
        # A checkpoint of this step exists when a step is reached again; the one that the run resumed from is older.
        with staged_folder(path) as staged:
            write_synced(staged / TENSORS, save(dict(self.tensors)))
            write_synced(staged / FACTS, json.dumps({"step": self.step, **self.facts}, indent=1).encode())
            self.trace.write(staged / TRACE)
            digests = {name: sha256((staged / name).read_bytes()).hexdigest() for name in (TENSORS, FACTS, TRACE)}
            write_synced(staged / MANIFEST, json.dumps(digests, indent=1).encode())
        # Later checkpoints belong to a run that was resumed from before them: they may be damaged and do not count.
        earlier = [path for path in checkpoint_paths(folder) if checkpoint_step(path) <= self.step]
        for old in earlier[keep:] if keep else ():
            remove(old)
        return path

    @classmethod
    def read(cls, path: Path) -> Checkpoint:
        """Return the checkpoint at ``path``.

        Raises:
            CheckpointError: A file is missing, or is not what was written.
        """
        try:
            digests = read_json(path / MANIFEST, MANIFEST_DIGESTS)
            contents = {name: read_content(path / name, limit=None) for name in (TENSORS, FACTS, TRACE)}
            damaged = [name for name, content in contents.items() if sha256(content).hexdigest() != digests[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not a whole checkpoint ({error}): name another, or 'latest'") from error
        if damaged:
            raise CheckpointError(f"{path} is damaged ({', '.join(damaged)} changed): name another, or 'latest'")
        try:
            facts = parse_json(contents[FACTS])
            if mismatch := find_mismatch(facts, {"step": int}):
                raise ValueError(mismatch)
            return cls(facts.pop("step"), load(contents[TENSORS]), facts, Trace.read(path / TRACE))
        except (ValueError, KeyError, SafetensorError, TraceError) as error:
            raise CheckpointError(f"{path} is not a checkpoint of dvar ({error}): name another, or 'latest'") from error


def validate_run_facts(checkpoint: Checkpoint) -> None:
    """Raise a `CheckpointError` unless a checkpoint has the facts that a run writes."""
    if mismatch := find_mismatch(checkpoint.facts, CHECKPOINT_FACTS):
        name = checkpoint_name(checkpoint.step)
        raise CheckpointError(
            f"{name} is not a checkpoint of a run of dvar ({mismatch}): name another, or start afresh"
        )


def latest_checkpoint(folder: Path) -> Checkpoint:
    """Return the newest whole checkpoint in ``folder``, with a warning for each newer one that is damaged.

    Raises:
        CheckpointError: There is none.
    """
    for path in checkpoint_paths(folder):
        try:
            return Checkpoint.read(path)
        except CheckpointError as error:
            warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    raise CheckpointError(f"{folder} holds no whole checkpoint to resume from: start afresh with --overwrite")
