"""The held samples of a launched script."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from launched_script import fresh_process
from torch.utils.data import DataLoader, TensorDataset

from dvar.launch.held import draw_held_items


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("skipped", [(1,), (3,), (2, 2), (4,)])
def test_a_loader_that_skips_batches_has_the_held_samples_of_the_whole_one(
    skipped: tuple[int, ...], whole: bool, shuffle: bool
) -> None:
    with fresh_process():
        loader = Accelerator(cpu=True).prepare(DataLoader(TensorDataset(torch.arange(10)), 3, shuffle=shuffle))
        fresh = draw_held_items(loader, 8, 5, whole=whole)
        for batches in skipped:
            loader = skip_first_batches(loader, batches)
        resumed = draw_held_items(loader, 8, 5, whole=whole)
    assert [item[0].tolist() for item in resumed.items] == [item[0].tolist() for item in fresh.items]
    assert sum(len(item[0]) for item in fresh.items) == (9 if whole else 8)
