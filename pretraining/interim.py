"""Stages in between, kept in git so that training can go on elsewhere: matrices as whole numbers of 8 bits.

``python -m pretraining.interim keep unet`` writes the moving average of ``work/unet/`` to ``pretraining/interim/``;
``python -m pretraining.interim restore`` lays out every kept stage that ``work/`` lacks.  The optimisers' moments are
gone.  A stage that has ended is shipped instead, and its file removed.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretraining.training import WORK, averages

FOLDER = Path(__file__).with_name("interim")
SCALE = ".scale"


def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return matrices as int8, each row by its own scale beside it, and everything else in float16."""
    quantised = {}
    for key, tensor in tensors.items():
        if tensor.ndim < 2:
            quantised[key] = tensor.half()
            continue
        scale = tensor.flatten(1).abs().amax(dim=1).clamp(min=1e-12) / 127
        quantised[key] = (tensor / scale.view(-1, *[1] * (tensor.ndim - 1))).round().to(torch.int8).contiguous()
        quantised[key + SCALE] = scale.float()
    return quantised


def restore_tensors(kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what `quantise` kept, in float32."""
    return {
        key: tensor.float() * kept[key + SCALE].view(-1, *[1] * (tensor.ndim - 1))
        if key + SCALE in kept
        else tensor.float()
        for key, tensor in kept.items()
        if not key.endswith(SCALE)
    }


def keep(name: str) -> Path:
    """Write the moving average of a stage, and what its stage.json says, and return the file."""
    stage = (WORK / name / "stage.json").read_text()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file(quantise(averages(name)), path, metadata={"stage": stage})
    return path


def restore() -> list[str]:
    """Lay out every kept stage that ``work/`` lacks, and return their names."""
    from safetensors import safe_open

    names = []
    for path in sorted(FOLDER.glob("*.safetensors")):
        folder = WORK / path.stem
        if (folder / "state.safetensors").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        with safe_open(path, "pt") as file:
            stage = json.loads(file.metadata()["stage"])
        tensors = {"step": torch.tensor(stage["reached"])}
        for key, value in restore_tensors(load_file(path)).items():
            tensors |= {f"weight.{key}": value, f"average.{key}": value.clone()}
        save_file(tensors, folder / "state.part")
        (folder / "stage.json").write_text(json.dumps(stage, indent=1) + "\n")
        os.replace(folder / "state.part", folder / "state.safetensors")
        names.append(path.stem)
    return names


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("keep", "restore"))
    parser.add_argument("stages", nargs="*", help="what to keep")
    chosen = parser.parse_args()
    print(*(restore() if chosen.action == "restore" else map(keep, chosen.stages)))


if __name__ == "__main__":
    main()
