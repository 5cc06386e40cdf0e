"""Checkpoint files with a flipped bit or truncated: detected, reported, and the previous checkpoint is used."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch

from dvar.stopping.trace import Trace
from dvar.training.checkpoint import FACTS, MANIFEST, TENSORS, Checkpoint, latest_checkpoint
from dvar.training.run_layout import TRACE


def write_checkpoint(folder: Path, step: int) -> Path:
    trace = Trace({"timesteps": [1]})
    for row in range(step + 1):
        trace.record(row, [0.5 / (row + 1)])
    return Checkpoint(step, {"method/<thing>": torch.full((2, 3), float(step))}, {"best_step": 0}, trace).write(folder)


@pytest.mark.parametrize("name", [TENSORS, FACTS, TRACE, MANIFEST])
@pytest.mark.parametrize("damage", ["flipped", "truncated"])
def test_damage_at_any_byte_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    write_checkpoint(tmp_path, 5)
    file = write_checkpoint(tmp_path, 6) / name
    content, random_state = file.read_bytes(), random.Random(0)
    positions = range(len(content)) if len(content) < 100 else random_state.sample(range(len(content)), 100)
    for position in positions:
        flipped = (
            content[:position] + bytes([content[position] ^ 1 << random_state.randrange(8)]) + content[position + 1 :]
        )
        file.write_bytes(flipped if damage == "flipped" else content[:position])
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")
            assert latest_checkpoint(tmp_path).step == 5, position
        assert len(messages) == 1
        assert "checkpoint-6 is" in str(messages[0].message)
        assert "trying the one before it" in str(messages[0].message)
    file.write_bytes(content)
    assert latest_checkpoint(tmp_path).step == 6
