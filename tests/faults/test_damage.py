"""Checkpoint files with a flipped byte or cut short anywhere: noticed, told, and the checkpoint before is used."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
import torch

from dvar.stopping.trace import Trace
from dvar.training.checkpoint import FACTS, MANIFEST, TENSORS, Checkpoint, latest_checkpoint
from dvar.training.run_layout import TRACE


def written(folder: Path, step: int) -> Path:
    trace = Trace({"timesteps": [1]})
    for at in range(step + 1):
        trace.record(at, [0.5 / (at + 1)])
    return Checkpoint(step, {"method/<thing>": torch.full((2, 3), float(step))}, {"best_step": 0}, trace).write(folder)


@pytest.mark.parametrize("name", [TENSORS, FACTS, TRACE, MANIFEST])
@pytest.mark.parametrize("how", ["flipped", "cut"])
def test_damage_at_any_byte_is_noticed_and_the_one_before_is_used(tmp_path: Path, name: str, how: str) -> None:
    written(tmp_path, 5)
    file = written(tmp_path, 6) / name
    sound, choose = file.read_bytes(), random.Random(0)
    places = range(len(sound)) if len(sound) < 100 else choose.sample(range(len(sound)), 100)
    for place in places:
        flipped = sound[:place] + bytes([sound[place] ^ 1 << choose.randrange(8)]) + sound[place + 1 :]
        file.write_bytes(flipped if how == "flipped" else sound[:place])
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert latest_checkpoint(tmp_path).step == 5, place
        assert len(told) == 1
        assert "checkpoint-6 is" in str(told[0].message)
        assert "trying the one before it" in str(told[0].message)
    file.write_bytes(sound)
    assert latest_checkpoint(tmp_path).step == 6
