"""The probe measures, and leaves flags, random states and gradients as they were."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dvar import Dvar, Probe, RefusedInput, Trace
from dvar.stopping.probe import PairedProbe, draw_stratified_timesteps


def mean_square(difference: Tensor) -> Tensor:
    return difference.square().mean(dim=1)


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


def build_loss(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda held: mean_square(net(held) - held)


def read_flags(net: nn.Module) -> dict[str, bool]:
    return {name: part.training for name, part in net.named_modules()}


def mix_flags(net: Net) -> dict[str, bool]:
    """Set flags in a pattern that neither `train()` nor `eval()` restores, and return them."""
    net.body.training = False
    net.body[1].training = False
    assert set(read_flags(net).values()) == {True, False}
    return read_flags(net)


def read_random_states() -> tuple[Any, ...]:
    return random.getstate(), repr(np.random.get_state(legacy=False)), torch.get_rng_state().numpy().tobytes()


def test_it_returns_float32_losses_per_sample_on_the_cpu_without_gradient() -> None:
    net = Net()
    measured = Probe(build_loss(net), HELD, [net])()
    assert measured.shape == (8,)
    assert measured.dtype == torch.float32
    assert measured.device.type == "cpu"
    assert not measured.requires_grad
    assert measured.grad_fn is None
    expected = build_loss(net.eval())(HELD)
    assert torch.equal(measured, expected.detach())


def test_double_precision_is_rounded_to_float32() -> None:
    net = Net().double()
    measured = Probe(build_loss(net), HELD.double(), [net])()
    assert measured.dtype == torch.float32
    assert torch.equal(measured, build_loss(net.eval())(HELD.double()).detach().float())


def test_measuring_twice_gives_the_same_bits() -> None:
    net = Net()
    mix_flags(net)
    probe = Probe(build_loss(net), HELD, [net])
    first = probe()
    torch.rand(5), random.random()
    assert torch.equal(first, probe())


def test_every_submodule_has_its_own_flag_again() -> None:
    net = Net()
    before, merges = mix_flags(net), net.merges
    Probe(build_loss(net), HELD, [net, net.body])()
    assert read_flags(net) == before
    assert net.merges == merges  # set directly: `train()` and `eval()` were not called


def test_flags_and_random_states_are_restored_when_the_loss_raises() -> None:
    net = Net()
    before, states = mix_flags(net), read_random_states()
    seen: dict[str, bool] = {}

    def failing(held: Tensor) -> Tensor:
        seen.update(read_flags(net), gradient=torch.is_grad_enabled())
        net(held)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        Probe(failing, HELD, [net])()
    assert not any(seen.values())
    assert read_flags(net) == before
    assert read_random_states() == states
    assert torch.is_grad_enabled()


def test_global_random_states_are_bit_equal_afterwards() -> None:
    net = Net()
    probe = Probe(build_loss(net), HELD, [net])
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    states = read_random_states()
    net(HELD)
    assert read_random_states() != states  # the network does draw
    states = read_random_states()
    probe()
    assert read_random_states() == states


def test_weights_buffers_and_gradients_are_untouched() -> None:
    net = Net()
    build_loss(net)(HELD).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad.clone() for name, value in net.named_parameters() if value.grad is not None}
    state = {name: value.clone() for name, value in net.state_dict().items()}
    assert gradients
    Probe(build_loss(net), HELD, [net])()
    after = {name: value.grad for name, value in net.named_parameters() if value.grad is not None}
    assert after.keys() == gradients.keys()
    assert all(torch.equal(after[name], gradient) for name, gradient in gradients.items())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.zero_grad(set_to_none=True)
    Probe(build_loss(net), HELD, [net])()
    assert all(value.grad is None for value in net.parameters())


def test_training_is_the_same_with_and_without_it() -> None:
    def trained(every: int | None) -> dict[str, Tensor]:
        net = Net()
        torch.manual_seed(11)
        probe, optimizer = Probe(build_loss(net), HELD, [net]), torch.optim.AdamW(net.parameters())
        for step in range(6):
            if every and step % every == 0:
                probe()
            optimizer.zero_grad()
            build_loss(net)(torch.randn(8, 4)).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return net.state_dict()

    plain = trained(None)
    for every in (1, 2):
        probed = trained(every)
        assert all(torch.equal(value, probed[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("output", "messages"),
    [
        (torch.tensor(0.5), [r"got the shape ()"]),
        (torch.ones(8, 4), [r"got the shape (8, 4)"]),
        (torch.ones(0), [r"got the shape (0,)"]),
        (torch.ones(8, dtype=torch.bfloat16), ["got torch.bfloat16"]),
        (torch.ones((), dtype=torch.float16), ["got the shape ()", "got torch.float16"]),
    ],
)
def test_losses_of_another_shape_or_precision_are_refused(output: Tensor, messages: list[str]) -> None:
    with pytest.raises(RefusedInput) as caught:
        Probe(lambda held: output, HELD, [nn.Identity()])()
    assert len(caught.value.problems) == len(messages)
    assert all(part in problem for part, problem in zip(messages, caught.value.problems, strict=True))


def test_the_data_parallel_wrapper_is_refused() -> None:
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    with pytest.raises(RefusedInput, match=r"got DistributedDataParallel: pass its `\.module`"):
        Probe(lambda held: held, HELD, [nn.Linear(1, 1), wrapper])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_random_state_of_the_gpu_is_kept_as_well() -> None:
    torch.rand(1, device="cuda")
    before = torch.cuda.get_rng_state_all()
    probe = Probe(lambda held: torch.rand(8, device="cuda"), HELD, [nn.Identity()])
    assert torch.equal(probe(), probe())
    after = torch.cuda.get_rng_state_all()
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


# --- any callable ---------------------------------------------------------------------------------------------------


class Owner:
    def __init__(self) -> None:
        self.net = Net()

    def loss(self, held: Tensor) -> Tensor:
        return mean_square(self.net(held) - held)

    __call__ = loss


def compute_loss(held: Tensor, net: nn.Module) -> Tensor:
    return mean_square(net(held) - held)


def compute_loss_of(net: nn.Module, held: Tensor) -> Tensor:
    return compute_loss(held, net)


GLOBAL = Net()


def compute_loss_of_global(held: Tensor) -> Tensor:
    return mean_square(GLOBAL(held) - held)


@pytest.mark.parametrize(
    "loss",
    [
        *(build_loss(Net()), Owner().loss, Owner(), compute_loss_of_global),
        *(partial(compute_loss, net=Net()), partial(compute_loss_of, Net())),
    ],
    ids=["closure", "method", "object", "global", "partial by name", "partial by place"],
)
def test_the_modules_that_a_callable_holds_are_found(loss: Callable[[Tensor], Tensor]) -> None:
    # Dropout is off, so the same held batch gives the same losses under two seeds: the modules were put in evaluation.
    assert torch.equal(Probe(loss, HELD)(), Probe(loss, HELD, seed=1)())


@pytest.mark.parametrize("modules", [None, [], ()])
def test_a_probe_without_any_module_is_refused(modules: Any) -> None:
    with pytest.raises(RefusedInput, match=r"got none and found none on the loss: pass modules="):
        Probe(lambda held: held.mean(dim=1), HELD, modules)


def test_a_loss_that_draws_its_own_noise_is_held_by_its_seed() -> None:
    net = Net()

    def noisy(held: Tensor) -> Tensor:
        shift = random.random() + float(np.random.rand())
        return mean_square(net(held + torch.randn_like(held)) - held) + shift

    probe, states = Probe(noisy, HELD), read_random_states()
    first = probe()
    torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first, probe())
    assert not torch.equal(first, Probe(noisy, HELD, seed=1)())
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    states = read_random_states()
    probe()
    assert read_random_states() == states


def test_a_captured_batch_is_drawn_once_and_is_beyond_reach() -> None:
    net, source, states = Net(), torch.zeros(8, 4), read_random_states()

    def draw() -> dict[str, Any]:
        return {"x": source, "noise": [torch.randn(8, 4)], "timesteps": torch.arange(8)}

    def loss(held: dict[str, Any]) -> Tensor:
        return mean_square(net(held["x"] + held["noise"][0]) - held["noise"][0])

    probe = Probe.capture(loss, draw)
    assert read_random_states() == states
    first = probe()
    source.fill_(9.0)
    assert torch.equal(first, probe())
    assert probe.header == {"timesteps": list(range(8))}
    assert Trace(probe.header).header["timesteps"] == list(range(8))
    assert Probe(build_loss(net), HELD).header == {}


class Batch(NamedTuple):
    x: Tensor
    timesteps: Tensor


def test_a_captured_tuple_with_names_keeps_them_and_is_beyond_reach_too() -> None:
    net, source = Net(), torch.zeros(8, 4)
    probe = Probe.capture(lambda held: build_loss(net)(held.x), lambda: Batch(source, torch.arange(8)), [net])
    first = probe()
    source.fill_(9.0)
    assert torch.equal(first, probe())
    assert probe.header == {"timesteps": list(range(8))}


def test_what_a_capture_draws_is_keyed_by_its_seed() -> None:
    net = Net()
    first, same, other = (Probe.capture(build_loss(net), lambda: torch.randn(8, 4), seed=seed)() for seed in (7, 7, 8))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_seed_may_be_of_any_size_and_does_not_start_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA is messages how to start"))
    assert torch.equal(Probe(build_loss(net), HELD, seed=2**40)(), Probe(build_loss(net), HELD)())


def test_the_random_state_of_other_accelerators_is_kept_and_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator of the CPU in the place of that of Apple's GPU, which draws what the loss draws there."""
    device = torch.Generator().manual_seed(1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", device.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", device.set_state)
    monkeypatch.setattr(torch.mps, "manual_seed", device.manual_seed)
    before = device.get_state()
    probe = Probe(lambda held: torch.rand(8, generator=device), HELD, [nn.Identity()])
    assert torch.equal(probe(), probe())
    assert torch.equal(device.get_state(), before)


def build_paired_probe(net: Net) -> PairedProbe[dict[str, Tensor]]:
    frozen = copy.deepcopy(net)

    def loss(model: Net, draws: dict[str, Tensor]) -> Tensor:
        return mean_square(model(draws["x"]) - torch.randn(8, 4))

    def draw(step: int) -> dict[str, Tensor]:
        return {"x": torch.randn(8, 4), "timesteps": torch.randint(1000, (8,))}

    return PairedProbe(partial(loss, net), partial(loss, frozen), draw)


def test_a_paired_reading_is_zero_before_the_first_step_and_the_gain_afterwards() -> None:
    net = Net()
    probe = build_paired_probe(net)
    before, states = mix_flags(net), read_random_states()
    assert torch.equal(probe(0), torch.zeros(8))
    assert torch.equal(probe(1), torch.zeros(8))
    with torch.no_grad():
        net.frozen.get_parameter("0.bias").add_(1.0)
    measured = probe.measure(1)
    assert measured["eval"].dtype == torch.float32
    assert not torch.equal(measured["eval"], torch.zeros(8))
    assert torch.equal(measured["eval"], probe(1))
    again = probe.measure(2)
    assert again["timesteps"] != measured["timesteps"]
    assert not torch.equal(again["eval"], measured["eval"])
    assert read_flags(net) == before
    assert read_random_states() == states


def test_a_paired_reading_is_the_loss_less_the_frozen_models_before_it_is_rounded() -> None:
    # In float32 both would be 1.
    now, before = torch.full((8,), 1.0, dtype=torch.float64), torch.full((8,), 1.0 + 1e-9, dtype=torch.float64)
    gain = PairedProbe(lambda draws: now, lambda draws: before, lambda step: HELD, [nn.Identity()])(3)
    torch.testing.assert_close(gain, torch.full((8,), -1e-9), rtol=1e-6, atol=0)


def test_the_draws_of_a_paired_reading_are_keyed_by_its_seed_and_step() -> None:
    batches: list[Tensor] = []

    def draw(step: int) -> Tensor:
        batches.append(torch.rand(8))
        return batches[-1]

    for seed, step in ((0, 1), (0, 1), (0, 2), (1, 1)):
        PairedProbe(lambda draws: draws, lambda draws: draws, draw, [nn.Identity()], seed=seed)(step)
    assert torch.equal(batches[0], batches[1])
    assert len({tuple(each.tolist()) for each in batches}) == 3


def test_both_models_of_a_paired_probe_are_found_and_measured_in_evaluation_mode() -> None:
    net, frozen, seen = Net(), Net(), {}

    def of(model: Net, name: str) -> Callable[[Tensor], Tensor]:
        def loss(draws: Tensor) -> Tensor:
            seen[name] = any(read_flags(model).values())
            return build_loss(model)(draws)

        return loss

    net.train(), frozen.train()
    PairedProbe(of(net, "in training"), of(frozen, "frozen"), lambda step: HELD)(0)
    assert seen == {"in training": False, "frozen": False}
    assert net.training
    assert frozen.training


def test_a_paired_probe_refuses_models_that_give_another_number_of_losses() -> None:
    net = Net()
    probe = PairedProbe(build_loss(net), lambda draws: build_loss(net)(draws)[:1], lambda step: HELD, [net])
    with pytest.raises(
        RefusedInput, match="needs as many losses from both models, got 8 and 1 in training and frozen: give"
    ):
        probe(0)


def test_a_paired_trace_refuses_to_be_normalised() -> None:
    probe = build_paired_probe(Net())
    trace = Trace(probe.header)
    trace.record(0, **probe.measure(0))
    assert len(trace.records[0]["timesteps"]) == 8
    with pytest.raises(RefusedInput, match=r"Dvar cannot use its metric: 'eval/first' needs the same samples"):
        Dvar(8, 0.15, metric="eval/first")(trace)


@pytest.mark.parametrize(("count", "timesteps"), [(1, 1000), (8, 1000), (8, 8), (5, 1000)])
def test_stratified_timesteps_have_one_in_each_part(count: int, timesteps: int) -> None:
    batches = torch.stack(
        [draw_stratified_timesteps(count, timesteps, torch.Generator().manual_seed(s)) for s in range(300)]
    )
    assert batches.dtype == torch.int64
    assert int(batches.min()) >= 0
    assert int(batches.max()) < timesteps
    edges = torch.arange(count) * timesteps / count
    assert bool((batches >= edges.floor()).all() and (batches <= edges + timesteps / count).all())
    # The standard error of the mean of 300 * count draws, of which each part's variance is (T / count)^2 / 12.
    error = timesteps / count / (12 * 300 * count) ** 0.5
    assert abs(float(batches.double().mean()) - (timesteps - 1) / 2) <= 4 * error + 0.5


def test_stratified_timesteps_come_from_the_generator() -> None:
    states = read_random_states()
    first, same, other = (draw_stratified_timesteps(8, 1000, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert read_random_states() == states


@pytest.mark.parametrize(("count", "timesteps"), [(0, 1000), (8, 0)])
def test_timesteps_are_not_drawn_from_an_empty_range(count: int, timesteps: int) -> None:
    with pytest.raises(RefusedInput, match=f"must be 1 or more, got {count} and {timesteps}"):
        draw_stratified_timesteps(count, timesteps)
