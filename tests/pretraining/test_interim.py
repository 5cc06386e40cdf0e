"""Stages that are kept in git in between: what is lost, and that training goes on from there."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch import nn

from pretraining import interim, training
from pretraining.training import Training


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (interim, training):
        monkeypatch.setattr(module, "WORK", tmp_path / "work")
    monkeypatch.setattr(interim, "FOLDER", tmp_path / "kept")
    return tmp_path


def build_stage(steps: int) -> Training:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(8, 1))
    chosen = argparse.Namespace(steps=steps, batch=4, seed=0, device="cpu")
    return Training("stage", model, chosen, lr=1e-2, data="none", optimizer="muon")


def train(stage: Training) -> Training:
    for step in stage:
        x = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(step))
        stage.update(stage.model(x).square().mean())
    return stage


def test_a_matrix_is_off_by_half_a_step_of_its_row_at_most() -> None:
    tensors = {"a": torch.randn(5, 3, 2, 2), "b": torch.randn(7), "c": torch.zeros(2, 2)}
    tensors["a"][0] *= 1000
    quantised = interim.quantise(tensors)
    assert quantised["a"].dtype == torch.int8
    again = interim.restore_tensors(quantised)
    step = tensors["a"].flatten(1).abs().amax(1) / 127
    assert ((again["a"] - tensors["a"]).flatten(1).abs() <= step[:, None] * 0.5001).all()
    torch.testing.assert_close(again["b"], tensors["b"], rtol=1e-3, atol=1e-4)
    assert torch.equal(again["c"], tensors["c"])


def test_training_goes_on_from_what_was_kept(folders: Path) -> None:
    stage = train(build_stage(12))
    interim.keep("stage")
    (folders / "work" / "stage" / "state.safetensors").unlink()
    assert interim.restore() == ["stage"]
    assert interim.restore() == []
    resumed = build_stage(20)
    assert resumed.step == 12
    for key, weight in resumed.model.named_parameters():
        torch.testing.assert_close(weight.detach(), stage.average[key], rtol=0.02, atol=5e-3)
    assert train(resumed).step == 20
