"""The probe measures, and leaves flags, random states and gradients as they were."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvar import Probe, RefusedInput


class Net(nn.Module):
    """Dropout, batch norm, a part that is frozen in evaluation mode, and randomness that no flag switches off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
        self.frozen = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
        self.merges = 0

    def train(self, mode: bool = True) -> Net:
        self.merges += 1  # as some adapters do
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        random.random(), np.random.rand(), torch.rand(3)
        out: Tensor = self.frozen(self.body(x))
        return out


HELD = torch.linspace(-1, 1, 32).reshape(8, 4)


def losses(net: Net) -> Any:
    return lambda held: (net(held) - held).square().mean(dim=1)


def flags(net: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in net.named_modules()}


def mixed(net: Net) -> dict[str, bool]:
    """A pattern of flags that neither `train()` nor `eval()` restores."""
    net.body.training = False
    net.body[1].training = False
    assert set(flags(net).values()) == {True, False}
    return flags(net)


def random_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().numpy().tobytes()


def test_it_returns_float32_losses_per_sample_on_the_cpu_without_gradient() -> None:
    net = Net()
    found = Probe(losses(net), HELD, [net])()
    assert found.shape == (8,)
    assert found.dtype == torch.float32
    assert found.device.type == "cpu"
    assert not found.requires_grad
    assert found.grad_fn is None
    expected = losses(net.eval())(HELD)
    assert torch.equal(found, expected.detach())


def test_double_precision_is_rounded_to_float32() -> None:
    net = Net().double()
    found = Probe(losses(net), HELD.double(), [net])()
    assert found.dtype == torch.float32
    assert torch.equal(found, losses(net.eval())(HELD.double()).detach().float())


def test_measuring_twice_gives_the_same_bits() -> None:
    net = Net()
    mixed(net)
    probe = Probe(losses(net), HELD, [net])
    first = probe()
    torch.rand(5), random.random()
    assert torch.equal(first, probe())


def test_every_submodule_has_its_own_flag_again() -> None:
    net = Net()
    before, merges = mixed(net), net.merges
    Probe(losses(net), HELD, [net, net.body])()
    assert flags(net) == before
    assert net.merges == merges  # set directly: `train()` and `eval()` were not called


def test_flags_and_random_states_are_restored_when_the_loss_raises() -> None:
    net = Net()
    before, states, seen = mixed(net), random_states(), {}

    def failing(held: Tensor) -> Tensor:
        seen.update(flags(net), gradient=torch.is_grad_enabled())
        net(held)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Probe(failing, HELD, [net])()
    assert not any(seen.values())
    assert flags(net) == before
    assert random_states() == states
    assert torch.is_grad_enabled()


def test_global_random_states_are_bit_equal_afterwards() -> None:
    net = Net()
    probe = Probe(losses(net), HELD, [net])
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = random_states()
    net(HELD)
    assert random_states() != states  # the network does draw
    states = random_states()
    probe()
    assert random_states() == states


def test_weights_buffers_and_gradients_are_untouched() -> None:
    net = Net()
    losses(net)(HELD).sum().backward()
    gradients = {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert gradients
    Probe(losses(net), HELD, [net])()
    assert all(torch.equal(value.grad, gradients[name]) for name, value in net.named_parameters())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.zero_grad(set_to_none=True)
    Probe(losses(net), HELD, [net])()
    assert all(value.grad is None for value in net.parameters())


def test_training_is_the_same_with_and_without_it() -> None:
    def trained(every: int | None) -> dict[str, Tensor]:
        net = Net()
        torch.manual_seed(11)
        probe, optimizer = Probe(losses(net), HELD, [net]), torch.optim.AdamW(net.parameters())
        for step in range(6):
            if every and step % every == 0:
                probe()
            optimizer.zero_grad()
            losses(net)(torch.randn(8, 4)).mean().backward()
            optimizer.step()
        return net.state_dict()

    plain = trained(None)
    for every in (1, 2):
        probed = trained(every)
        assert all(torch.equal(value, probed[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (torch.tensor(0.5), [r"got the shape ()"]),
        (torch.ones(8, 4), [r"got the shape (8, 4)"]),
        (torch.ones(0), [r"got the shape (0,)"]),
        (torch.ones(8, dtype=torch.bfloat16), ["got torch.bfloat16"]),
        (torch.ones((), dtype=torch.float16), ["got the shape ()", "got torch.float16"]),
    ],
)
def test_losses_of_another_shape_or_precision_are_refused(given: Tensor, told: list[str]) -> None:
    with pytest.raises(RefusedInput) as caught:
        Probe(lambda held: given, HELD, [])()
    assert len(caught.value.problems) == len(told)
    assert all(part in problem for part, problem in zip(told, caught.value.problems, strict=True))


def test_the_data_parallel_wrapper_is_refused() -> None:
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    with pytest.raises(RefusedInput, match=r"got DistributedDataParallel: pass its `\.module`"):
        Probe(lambda held: held, HELD, [nn.Linear(1, 1), wrapper])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_random_state_of_the_gpu_is_kept_as_well() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state_all()
    Probe(lambda held: torch.rand(8, device="cuda"), HELD, [])()
    after = torch.cuda.get_rng_state_all()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
