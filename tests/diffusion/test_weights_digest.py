"""The digest of a base model's weights: equal weights have equal ones, and any change shows."""

from __future__ import annotations

from hashlib import sha256

import pytest
import torch
from torch import nn

from dvar.diffusion.backbones import weights_digest
from dvar.diffusion.backbones.weights_digest import digest_of_weights

NOISE = torch.linspace(0, 1, 10)


def make_networks(seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), nn.Embedding(5, 2)]


@pytest.mark.parametrize("large", [0, 10**9], ids=["large", "small"])
def test_any_change_of_a_weight_a_name_or_the_schedule_shows(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_digest, "LARGE", large)
    digest = digest_of_weights(make_networks(), NOISE)
    assert digest_of_weights(make_networks(), NOISE) == digest
    assert digest_of_weights(make_networks(1), NOISE) != digest
    assert digest_of_weights(make_networks()[::-1], NOISE) != digest
    assert digest_of_weights(make_networks(), NOISE.flip(0)) != digest
    for number, network in enumerate(make_networks()):
        for name in network.state_dict():
            changed = make_networks()
            part = changed[number].state_dict()[name]
            part.view(-1)[-1:] += 1
            assert digest_of_weights(changed, NOISE) != digest, name
    first, second = make_networks()
    assert digest_of_weights([nn.Sequential(first), second], NOISE) != digest, "other names"


@pytest.mark.parametrize("large", [0, 10**9], ids=["large", "small"])
def test_precision_that_holds_the_weights_does_not_change_it(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_digest, "LARGE", large)
    half = [network.to(torch.bfloat16) for network in make_networks()]
    digest = digest_of_weights(half, NOISE)
    assert digest_of_weights([network.float() for network in half], NOISE) == digest


def test_the_digest_of_a_small_model_is_that_of_the_recorded_runs() -> None:
    """SHA-256 of the schedule, then of each name and its numbers in float32, one behind the other."""
    network = nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[1.0, 2.0]]))
        network.bias.fill_(3.0)
    content = torch.tensor([0.5]).numpy().tobytes() + b"weight" + torch.tensor([1.0, 2.0]).numpy().tobytes()
    content += b"bias" + torch.tensor([3.0]).numpy().tobytes()
    assert digest_of_weights([network], torch.tensor([0.5])) == sha256(content).hexdigest()
