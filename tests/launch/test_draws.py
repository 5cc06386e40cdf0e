"""Draws on held samples: generators of the script, and stratified timesteps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dvar.launch.draws import DRAWS, fix_draws, stratified_quantiles

DRAW_TIMESTEPS: dict[str, Callable[[int], Tensor]] = {
    "randint": lambda count: torch.randint(0, 1000, (count,)).double() / 1000,
    "randint of one bound": lambda count: torch.randint(1000, size=(count,)).double() / 1000,
    "randint by name": lambda count: (torch.randint(low=200, high=1000, size=(count,)).double() - 200) / 800,
    "rand": lambda count: torch.rand(count).double(),
    "rand by name": lambda count: torch.rand(size=(count,), dtype=torch.float64),
    "normal": lambda count: torch.special.ndtr((torch.normal(0.5, 2.0, size=(count,)).double() - 0.5) / 2),
    "normal by name": lambda count: torch.special.ndtr(torch.normal(mean=0.0, std=1.0, size=(count,)).double()),
    "randn": lambda count: torch.special.ndtr(torch.randn(count).double()),
}


@settings(max_examples=30)
@given(length=st.integers(1, 5), samples=st.integers(1, 9), seed=st.integers(0, 99))
def test_each_entry_falls_once_into_each_stratum_and_all_together_into_finer_ones(
    length: int, samples: int, seed: int
) -> None:
    quantiles = torch.stack([stratified_quantiles(length, sample, samples, seed + sample) for sample in range(samples)])
    assert ((quantiles > 0) & (quantiles < 1)).all()
    strata = (quantiles * samples).long().sort(dim=0).values
    assert torch.equal(strata, torch.arange(samples)[:, None].expand(samples, length))
    fine = (quantiles * samples * length).long().flatten().sort().values
    assert torch.equal(fine, torch.arange(samples * length))


@pytest.mark.parametrize("draw", DRAW_TIMESTEPS.values(), ids=DRAW_TIMESTEPS)
@pytest.mark.parametrize("length", [1, 3])
def test_the_first_vector_of_a_sample_is_stratified_and_no_later_one(
    draw: Callable[[int], Tensor], length: int
) -> None:
    values, later = [], []
    for sample in range(8):
        torch.manual_seed(sample)
        with fix_draws(sample, sample, 8):
            torch.randn(2, 3)
            values.append(draw(length))
            later.append(torch.rand(1).item())
        torch.manual_seed(sample)
        torch.randn(2, 3)
        draw(length)
        assert later[-1] == torch.rand(1).item()
    strata = (torch.stack(values).clamp(max=1 - 1e-12) * 8 + 1e-9).long().sort(dim=0).values
    assert torch.equal(strata, torch.arange(8)[:, None].expand(8, length))


def test_generators_of_the_script_draw_the_same_each_time_and_then_go_on() -> None:
    generator, other = torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)
    draws = []
    for _ in range(2):
        torch.rand(3, generator=generator)
        torch.rand(3, generator=other)
        with fix_draws(11, 0, 8):
            draws.append(torch.randn(2, 2, generator=generator))
            draws.append(torch.randperm(4, generator=generator))
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert torch.equal(torch.rand(3, generator=generator), torch.rand(3, generator=other))


def test_the_functions_of_torch_are_restored_also_after_an_error() -> None:
    before = {name: getattr(torch, name) for name in DRAWS}
    with suppress(KeyError), fix_draws(0, 0, 1):
        assert torch.rand is not before["rand"]
        raise KeyError
    assert {name: getattr(torch, name) for name in DRAWS} == before
