"""What the workers of one machine may use: its GPUs and cores."""

from __future__ import annotations

import os

import pytest
import torch

from dvar.cluster.local import usable_cores, visible_gpus


@pytest.mark.parametrize(
    ("listed", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("2,3", 2, ["2", "3"]),
        (" GPU-5ebe9f43 , MIG-2 ", 2, ["GPU-5ebe9f43", "MIG-2"]),
        ("2,3,9", 2, ["2", "3"]),
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_workers_are_given_the_gpus_that_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, listed: str | None, count: int, names: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    assert visible_gpus() == names


def test_cores_are_counted_on_systems_that_bind_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert usable_cores() == 1
