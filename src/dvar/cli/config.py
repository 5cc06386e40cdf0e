"""Settings of `dvar demo`, with their help and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvar import mini
from dvar.config.fields import Config, invalid_fields, setting
from dvar.errors import nearest


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Config):
    """Every setting of ``dvar demo``."""

    concept: str | None = setting(
        None, "Name of a bundled concept, as `dvar concepts` lists them; the first one by default."
    )
    output_dir: str | None = setting(None, "Folder of the run; by default runs/demo, which each demo replaces.")
    resume_from_checkpoint: str | None = setting(
        None, "Continue an interrupted demo: 'latest', or the name of a checkpoint."
    )

    @property
    def concept_name(self) -> str:
        """The name of the concept that is learned."""
        return self.concept or next(iter(mini.concepts()))

    @property
    def concept_folder(self) -> Path:
        """The folder with the images of the concept."""
        return mini.concepts()[self.concept_name]

    @property
    def training_settings(self) -> Mapping[str, Any]:
        """The settings of the training run, by name; a preset sets the others."""
        return {
            "instance_data_dir": self.concept_folder,
            "initializer_token": mini.noun(self.concept_name),
            "output_dir": self.output_dir or "runs/demo",
            "overwrite": self.output_dir is None and not self.resume_from_checkpoint,
            "resume_from_checkpoint": self.resume_from_checkpoint,
        }


def problems(config: DemoConfig) -> list[str]:
    """Return everything that is wrong with these settings."""
    messages = [message for _, message in invalid_fields(config)]
    concepts = mini.concepts()
    if config.concept_name not in concepts:
        near = nearest(config.concept_name, concepts)
        rule = f"concept {config.concept_name!r} is not bundled{f', the nearest is {near}' if near else ''}"
        messages.append(f"{rule}: see dvar concepts")
    return messages
