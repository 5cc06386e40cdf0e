"""The stable rank of an update against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dvar.recordings.weight_metrics import stable_rank


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 6), st.integers(0, 99))
def test_a_pair_of_lora_matrices_counts_as_its_product(rank: int, seed: int) -> None:
    down, up = matrix(rank, 24, seed=seed), matrix(16, rank, seed=seed + 1)
    state = {"unet.to_q.lora_A.weight": down, "unet.to_q.lora_B.weight": up}
    values = torch.linalg.svdvals(up @ down).square()
    measured = stable_rank(state, state)
    assert measured is not None
    assert measured == pytest.approx(float(values.sum() / values.max()), rel=1e-4)
    assert 1 <= measured <= rank + 1e-3


def test_other_matrices_count_by_their_change_and_the_mean_is_over_those_that_changed() -> None:
    untouched = {"a": matrix(5, 7), "b": matrix(4, 4, seed=1), "c": matrix(3, 3, seed=2), "vector": matrix(9)}
    # Three equal singular values have a stable rank of 3, one of 1; "c" stays.
    state = {
        **untouched,
        "a": untouched["a"] + torch.eye(5, 7) * torch.tensor([1.0] * 3 + [0.0] * 4),
        "vector": matrix(9, seed=3),
    }
    state["b"] = untouched["b"] + torch.outer(torch.ones(4), torch.arange(4.0))
    assert stable_rank(state, untouched) == pytest.approx(2, abs=1e-3)


def test_without_a_changed_matrix_there_is_none() -> None:
    state = {"<thing>": matrix(1, 8), "unet.lora_A.weight": matrix(2, 8), "unet.lora_B.weight": torch.zeros(8, 2)}
    assert stable_rank(state, {"<thing>": matrix(1, 8, seed=1)}) is None
