"""The study of the bundled model: the gate of its runs, and what is frozen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvar import mini
from dvar.analysis.eligibility import Eligibility
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import preset_settings
from dvar.stopping.trace import Trace
from pretraining import science

STEPS = (0, 25, 50, 100)


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(science, "ceiling", lambda concept: {"identity": 0.9})


def write_run(folder: Path, seed: int, identity: list[float], drop: float) -> Path:
    """Write a run whose L_det falls by ``drop`` at once and then alternates by 0.001 about its end."""
    path = folder / f"textual-inversion-purple_cat-0.01-{seed}-100"
    path.mkdir()
    scores = [{"step": s, "plain": {"identity": i}, "placed": {}} for s, i in zip(STEPS, identity, strict=True)]
    (path / "scores.json").write_text(json.dumps({"cap": 100, "scores": scores}))
    trace = Trace()
    for step in range(101):
        trace.record(step, 1.0 if step == 0 else 1.0 - drop + 0.0005 * (-1) ** step)
    trace.write(path / "trace.jsonl")
    return path


def test_the_gate_of_kept_runs_has_the_figures_they_have(tmp_path: Path) -> None:
    ends = (0.68, 0.70, 0.72)
    gate = science.gate([write_run(tmp_path, seed, [0.1, 0.5, end, end], 0.1) for seed, end in enumerate(ends)])
    assert (gate.runs, gate.cap) == (3, 100)
    assert [gate.ceiling, gate.early, gate.start, gate.end] == pytest.approx([0.9, 1.0, 0.1, 0.7])
    assert not gate.failures


def test_a_saved_gate_names_the_weights_it_was_measured_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(science, "GATES", tmp_path / "gate.json")
    gate = science.gate([write_run(tmp_path, 0, [0.1, 0.5, 0.7, 0.7], 0.1)])
    science.keep("mini", "custom-diffusion", gate)
    science.keep("mini", "textual-inversion", gate)
    content = json.loads(science.GATES.read_text())
    assert [*content["mini"]["gates"]] == ["textual-inversion", "custom-diffusion"]
    assert content["mini"]["sha256"] == json.loads(science.FROZEN.read_text())["mini"]["weights"]
    other = {**content["mini"], "sha256": "other weights"}
    science.GATES.write_text(json.dumps({"mini": other, "mini-flow": other}))
    science.keep("mini", "textual-inversion", gate)
    content = json.loads(science.GATES.read_text())
    assert [*content["mini"]["gates"]] == ["textual-inversion"]
    assert content["mini-flow"] == other


def test_the_gates_that_ship_are_of_the_weights_that_were_recorded() -> None:
    ships = Path(mini.__file__).with_name("gate.json")
    assert json.loads(ships.read_text())["mini"]["sha256"] == json.loads(science.FROZEN.read_text())["recorded"]
    assert [*mini.gates()] == ["textual-inversion", "dreambooth-lora", "custom-diffusion"]


def test_the_gate_of_the_model_that_ships_waits_for_its_recordings() -> None:
    gate = json.loads(science.FROZEN.with_name("gate_of_the_panel.json").read_text())["mini"]
    assert gate["sha256"] == json.loads(science.FROZEN.read_text())["mini"]["weights"]
    assert [*gate["gates"]] == ["textual-inversion", "dreambooth-lora", "custom-diffusion"]
    for figures in gate["gates"].values():
        eligibility = Eligibility(**figures)
        assert (eligibility.failures, eligibility.roughness) == ((), ())


def test_what_was_frozen_is_what_ships() -> None:
    frozen = json.loads(science.FROZEN.read_text())
    assert frozen.pop("recorded")
    assert science.frozen() == frozen, (
        "weights or training settings changed: say why in LOG.md, then python -m pretraining.science freeze"
    )


def test_only_what_moves_the_training_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    before, own = science.frozen(), preset_settings
    monkeypatch.setattr(science, "preset_settings", lambda name, method: own(name, method) | {"window": 7})
    assert science.frozen() == before
    monkeypatch.setattr(science, "preset_settings", lambda name, method: own(name, method) | {"learning_rate": 7.0})
    for base, changed in science.frozen().items():
        assert changed["weights"] == before[base]["weights"]
        assert all(changed[method] != before[base][method] for method in PAPER_METHODS if method in changed)
