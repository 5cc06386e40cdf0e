"""The recipe's training state: a stage that is killed and started again ends with the same weights."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from pretraining import training
from pretraining.training import Training, load_average


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training, "WORK", tmp_path)
    return tmp_path


def build_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def build_stage(model: nn.Module, steps: int) -> Training:
    chosen = argparse.Namespace(steps=steps, batch=16, seed=0, device="cpu")
    return Training("stage", model, chosen, lr=1e-2, data="none")


def train_until(training: Training, until: int) -> None:
    for step in training:
        if step == until:
            training.save()
            return
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        training.update((training.model(x) - x.sum(1, keepdim=True)).square().mean())


def test_killed_and_started_again_it_ends_at_the_same_bits(work: Path) -> None:
    model = build_network()
    through = build_stage(model, 30)
    train_until(through, 30)
    expected, average = [p.clone() for p in model.parameters()], [a.clone() for a in through.average.values()]
    (work / "stage" / "state.safetensors").unlink()
    train_until(build_stage(build_network(), 30), 13)
    again = build_network()
    resumed = build_stage(again, 30)
    assert resumed.step == 13
    train_until(resumed, 30)
    assert all(torch.equal(a, b) for a, b in zip(expected, again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(average, resumed.average.values(), strict=True))


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
