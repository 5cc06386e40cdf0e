"""Runs that trained in a pack, compared with those that trained alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dvar.stopping.trace import Trace

# What a larger batch does to the order of sums: measured over 60 steps, 1e-7 of a loss, 4e-5 of a gradient's norm.
LOSS, NORM, WEIGHT = 2e-6, 1e-4, 2e-4


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without their seconds."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def load_weights(folder: Path) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    assert paths
    return {f"{path.name}/{name}": tensor for path in paths for name, tensor in load_file(path).items()}


def assert_equal_runs(first: Path, second: Path) -> None:
    """Assert that two runs have the same files, steps, losses and weights, but for the order of a sum."""
    ours, theirs = (Trace.read(folder / "trace.jsonl") for folder in (first, second))
    assert ours.header == theirs.header
    assert [record["step"] for record in ours.records] == [record["step"] for record in theirs.records]
    for name, tolerance in (("train_loss", LOSS), ("eval", LOSS), ("grad_norm", NORM)):
        np.testing.assert_allclose(ours.metric(name)[1], theirs.metric(name)[1], rtol=tolerance)
    ours_weights, theirs_weights = load_weights(first), load_weights(second)
    assert ours_weights.keys() == theirs_weights.keys()
    for name, weight in ours_weights.items():
        torch.testing.assert_close(weight, theirs_weights[name], rtol=WEIGHT, atol=WEIGHT)
    names = [{path.relative_to(folder).as_posix() for path in folder.rglob("*")} for folder in (first, second)]
    assert names[0] == names[1]
