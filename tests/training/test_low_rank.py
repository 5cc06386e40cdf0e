"""Low-rank changes by sample, against PEFT's own layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dvar.errors import RefusedInput
from dvar.training.low_rank import adapters_of, changed_by_rows


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).requires_grad_(False)


def adapt(base: nn.Module, seed: int, **settings: object) -> nn.Module:
    """Return a copy of a network with adapters whose second matrices are not zero."""
    torch.manual_seed(seed)
    config = LoraConfig(init_lora_weights=False, **{"target_modules": ["0", "2"], **settings})
    adapted: nn.Module = inject_adapter_in_model(config, copy.deepcopy(base))
    return adapted


def test_each_row_has_the_output_and_the_gradients_of_its_own_copy() -> None:
    base = network()
    copies = [
        adapt(base, 1, r=2, lora_alpha=2),
        adapt(base, 2, r=4, lora_alpha=1, target_modules=["2"]),
        copy.deepcopy(base),
        adapt(base, 3, r=3, lora_alpha=9),
    ]
    counts = [1, 3, 2, 2]
    states = torch.randn(sum(counts), 7, 6)
    with changed_by_rows(base, [(adapters_of(own), count) for own, count in zip(copies, counts, strict=True)]):
        outputs = base(states)
        torch.autograd.backward(outputs.square().sum())
    gradients = [weight.grad for own in copies for weight in own.parameters() if weight.requires_grad]
    for own, part, mine in zip(copies, torch.split(states, counts), torch.split(outputs, counts), strict=True):
        own.zero_grad()
        expected: Tensor = own(part)
        torch.testing.assert_close(mine, expected)
        if expected.requires_grad:
            torch.autograd.backward(expected.square().sum())
    again = [weight.grad for own in copies for weight in own.parameters() if weight.requires_grad]
    assert len(gradients) == 2 * 5
    torch.testing.assert_close(gradients, again)
    assert torch.equal(base(states), network()(states))  # and nothing is left of them


def test_a_row_that_is_not_a_number_stays_in_its_row() -> None:
    base = network()
    copies = [adapt(base, 1, r=2), adapt(base, 2, r=2)]
    states = torch.randn(2, 1, 6)
    results = []
    for broken in (False, True):
        for own in copies:
            own.zero_grad()
        states[0] = torch.nan if broken else states[0]
        with changed_by_rows(base, [(adapters_of(own), 1) for own in copies]):
            losses = base(states).square().sum(dim=(1, 2))
            torch.autograd.backward(list(losses))
        results.append([losses[1].detach(), *(w.grad.clone() for w in copies[1].parameters() if w.grad is not None)])
    assert len(results[0]) == 1 + 4
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_whatever_else_is_trained_or_random_is_refused() -> None:
    with pytest.raises(RefusedInput, match=r"and here 0\.lora_magnitude_vector\.default\.weight is trained or random"):
        adapters_of(adapt(network(), 1, r=2, use_dora=True))
    with pytest.raises(RefusedInput, match=r"and here 0\.lora_dropout\.default is trained or random"):
        adapters_of(adapt(network(), 1, r=2, lora_dropout=0.1))
    with pytest.raises(RefusedInput, match=r"and here 0\.weight is trained or random"):
        adapters_of(network().requires_grad_(True))
