"""Jobs on the tiny model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def tiny_settings(model: Path, **changes: Any) -> dict[str, Any]:
    """Return settings of a run of nine steps, with checkpoints at steps 0, 4 and 8."""
    return {
        "pretrained_model_name_or_path": str(model),
        "resolution": 32,
        "max_train_steps": 9,
        "window": 8,
        "probe_every": 1,
        "threshold": 1e-9,
        "random_flip": False,
        "validation_steps": 5,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        "checkpointing_steps": 4,
        **changes,
    }


def tiny_table(model: Path, concepts: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Return the table of a job on a concept."""
    settings = tiny_settings(model, initializer_token="mug", **changes)
    return {"id": name, "instance_data_dir": str(concepts / name), **settings}


def write_toml(path: Path, shared: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> Path:
    """Write a file of jobs."""

    def format_lines(table: Mapping[str, Any]) -> list[str]:
        return [
            f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in table.items()
        ]

    lines = format_lines(shared)
    for table in tables:
        lines += ["", "[[job]]", *format_lines(table)]
    path.write_text("\n".join(lines) + "\n")
    return path
