"""A short run on the tiny model, and what two equal runs have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from dvar.config.methods import TextualInversionConfig
from dvar.stopping.trace import Trace
from dvar.training.personalise import personalise
from dvar.training.run_layout import checkpoint_paths

CAP = 9


@dataclass(frozen=True)
class Outcome:
    """The results that two equal runs have in common."""

    vectors: Tensor
    records: list[dict[str, Any]]
    images: dict[str, bytes]

    @classmethod
    def of(cls, folder: Path) -> Outcome:
        records = [dict(record) for record in Trace.read(folder / "trace.jsonl").records]
        for record in records:
            record.pop("seconds")
        images = {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("samples/*/*.png")}
        return cls(load_file(folder / "learned_embeds.safetensors")["<thing>"], records, images)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Outcome)
            and torch.equal(self.vectors, other.vectors)
            and self.records == other.records
            and self.images == other.images
        )


def short_run(model: Path, images: Path, folder: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(images),
        initializer_token="mug",
        resolution=32,
        max_train_steps=CAP,
        window=8,
        threshold=1e-9,
        random_flip=False,
        validation_steps=5,
        num_validation_images=1,
        num_inference_steps=1,
        checkpointing_steps=4,
        output_dir=str(folder),
    )


def resume_run(config: TextualInversionConfig) -> Outcome:
    """Resume a run from its last checkpoint, or start it again if there is none, and return its outcome."""
    resume = "latest" if checkpoint_paths(Path(config.output_dir)) else None
    personalise(replace(config, resume_from_checkpoint=resume, overwrite=resume is None))
    return Outcome.of(Path(config.output_dir))
