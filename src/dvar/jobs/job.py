"""Jobs: runs of a batch, each with an id that says whether it is the same run as before."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from dvar.config.training import BUNDLED_MODEL, FREE_FIELDS, TrainingConfig
from dvar.files import read_json, visible_paths
from dvar.jobs.config import Checkpoints
from dvar.training.methods.registry import config_from_dict

PATHS = (
    *("instance_data_dir", "class_data_dir", "concepts_list", "sample_prompts"),
    *("pretrained_model_name_or_path", "single_file_config", "clip_model"),
)
"""Settings that name a file or a folder; a model may have a name of the hub instead."""
JOB = "job.json"
"""The file in a run's folder that says which job it belongs to."""
_DIGESTED = FREE_FIELDS - {"keep"}


def is_url(folder: str) -> bool:
    """Return whether a folder is behind a URL."""
    return "://" in folder


@dataclass(frozen=True)
class Job:
    """A run of a batch.

    Attributes:
        id: Its name in the batch.
        config: The settings of the run; ``output_dir`` is its folder, or the URL of one.
        checkpoints: The checkpoints that it leaves.
        scaled: What was scaled to a low cap, as a sentence; empty where nothing was.
    """

    id: str
    config: TrainingConfig
    checkpoints: Checkpoints = "none"
    scaled: str = ""

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of what the run computes: its settings, and the files that it reads."""
        settings = {name: value for name, value in self.config.to_dict().items() if name not in _DIGESTED}
        digest = sha256(json.dumps(settings, sort_keys=True).encode())
        for name, path in self._files():
            digest.update(name.encode() + b"\0" + sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    @property
    def paths(self) -> set[Path]:
        """The files and folders of this machine that the run reads, and the folder that its own is made in."""
        config = self.config
        names = {str(value) for name in PATHS if (value := getattr(config, name)) and value != BUNDLED_MODEL}
        paths = {Path(name).expanduser() for name in (*names, *self._listed_folders()) if not is_url(name)}
        if not is_url(config.output_dir):
            folder = Path(config.output_dir).expanduser().absolute()
            paths.add(next(parent for parent in (folder, *folder.parents) if parent.exists()))
        return {path for path in paths if path.exists()}  # others are names of the hub

    def to_json(self) -> str:
        """Return the job as text, for a worker."""
        return json.dumps({"id": self.id, "config": self.config.to_dict(), "checkpoints": self.checkpoints})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """Return the job that `to_json` returned."""
        content = json.loads(text)
        return cls(content["id"], config_from_dict(content["config"]), content["checkpoints"])

    def _files(self) -> Iterator[tuple[str, Path]]:
        """Yield the files that the run reads, but for its base model: what they are called in the digest, and where."""
        config = self.config
        for file in (config.concepts_list, config.sample_prompts):
            if file:
                yield Path(file).name, Path(file).expanduser()
        for folder in (config.instance_data_dir, config.class_data_dir, *self._listed_folders()):
            if folder:
                yield from _files_in(Path(folder).expanduser())

    def _listed_folders(self) -> Iterator[str]:
        """Yield the folders of images in the list of concepts, which is checked where the job is trained."""
        entries: Any = []
        if self.config.concepts_list:
            with suppress(ValueError):
                entries = read_json(Path(self.config.concepts_list).expanduser())
        for entry in entries if isinstance(entries, list) else ():
            for key in ("instance_data_dir", "class_data_dir"):
                if isinstance(entry, dict) and isinstance(folder := entry.get(key), str):
                    yield folder


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files in a folder of images, and those in the folders in it, whose names say how often they count."""
    paths = visible_paths(folder) if folder.is_dir() else []
    yield from ((path.name, path) for path in paths if path.is_file())
    for part in paths:
        if part.is_dir():
            yield from ((f"{part.name}/{path.name}", path) for path in visible_paths(part) if path.is_file())
