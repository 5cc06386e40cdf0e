"""The recipe's training state: a stage that is killed and started again ends with the same weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from pretraining import training
from pretraining.training import Training, load_average, share, together


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "WORK", tmp_path)
    return tmp_path


def build_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def build_stage(model: nn.Module, steps: int, optimizer: str = "adamw") -> Training:
    chosen = argparse.Namespace(steps=steps, batch=16, seed=0, device="cpu")
    return Training("stage", model, chosen, lr=1e-2, data="none", optimizer=optimizer)


def train_until(training: Training, until: int) -> None:
    for step in training:
        if step == until:
            training.save()
            return
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        training.update((training.model(x) - x.sum(1, keepdim=True)).square().mean())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_and_started_again_it_ends_at_the_same_bits(work: Path, optimizer: str) -> None:
    model = build_network()
    through = build_stage(model, 30, optimizer)
    train_until(through, 30)
    expected, average = [p.clone() for p in model.parameters()], [a.clone() for a in through.average.values()]
    (work / "stage" / "state.safetensors").unlink()
    train_until(build_stage(build_network(), 30, optimizer), 13)
    again = build_network()
    resumed = build_stage(again, 30, optimizer)
    assert resumed.step == 13
    train_until(resumed, 30)
    assert all(torch.equal(a, b) for a, b in zip(expected, again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average, resumed.average.values(), strict=True))


def test_muon_leaves_the_ends_and_vectors_to_adamw() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_in, self.inner, self.conv_out = nn.Conv2d(1, 2, 1), nn.Linear(2, 2), nn.Conv2d(2, 1, 1)

    model = Network()
    adamw, muon = build_stage(model, 3, "muon").optimizers
    assert [p is model.inner.weight for group in muon.param_groups for p in group["params"]] == [True]
    assert sum(len(group["params"]) for group in adamw.param_groups) == 5


def test_the_average_replaces_the_weights_for_a_while() -> None:
    model = build_network()
    state = build_stage(model, 5)
    train_until(state, 5)
    now = [p.clone() for p in model.parameters()]
    with state.averaged():
        assert all(torch.equal(p, state.average[key]) for key, p in model.named_parameters())
        assert not all(torch.equal(a, b) for a, b in zip(now, model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(now, model.parameters(), strict=True))


def test_frozen_weights_need_not_be_in_the_state() -> None:
    model = build_network()
    model[0].requires_grad_(False)
    state = build_stage(model, 3)
    train_until(state, 3)
    fresh = build_network()
    fresh[0].requires_grad_(False)
    loaded = load_average("stage", fresh)
    assert torch.equal(loaded.get_parameter("2.weight"), state.average["2.weight"])
    assert not any(p.requires_grad for p in loaded.parameters())


def test_another_shape_of_model_is_refused() -> None:
    train_until(build_stage(build_network(), 2), 2)
    with pytest.raises(SystemExit, match="another shape"):
        load_average("stage", nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1), nn.Linear(1, 1)))


def part_of(index: int, count: int) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(index))


def train_one_of_two(rank: int, folder: Path) -> None:
    """Train as process ``rank`` of two, which stop with their weights in ``folder`` alone."""
    training.WORK = folder
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    state = build_stage(build_network(), 5)
    for step in state:
        x = part_of(*share(step, 16))
        state.update((state.model(x) - x.sum(1, keepdim=True)).square().mean())
    highest = torch.tensor([float(rank)])
    together([highest], dist.ReduceOp.MAX)
    assert highest.item() == 1
    torch.save(dict(state.model.state_dict()), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_steps_of_one_with_both_parts(tmp_path: Path) -> None:
    spawn(train_one_of_two, (tmp_path,), nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert (tmp_path / "stage" / "state.safetensors").exists()
    (tmp_path / "stage" / "state.safetensors").unlink()
    single = build_stage(build_network(), 5)
    for step in single:
        x = torch.cat([part_of(2 * step, 8), part_of(2 * step + 1, 8)])
        single.update((single.model(x) - x.sum(1, keepdim=True)).square().mean())
    for key, value in single.model.state_dict().items():
        assert torch.equal(first[key], second[key])
        assert torch.allclose(first[key], value, atol=1e-6)
