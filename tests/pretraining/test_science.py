"""The gate before rules are ranked, on runs made up so that each figure is known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dvar.stopper.trace import Trace
from pretraining import science

STEPS = (0, 25, 50, 100)


@pytest.fixture(autouse=True)
def known_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(science, "ceiling", lambda concept: {"identity": 0.9})


def run(folder: Path, seed: int, identity: list[float], drop: float) -> Path:
    """L_det falls by ``drop`` at once and then jumps up and down by 0.001 about its end."""
    made = folder / f"textual-inversion-purple_cat-0.01-{seed}-100"
    made.mkdir()
    scores = [{"step": s, "plain": {"identity": i}, "placed": {}} for s, i in zip(STEPS, identity, strict=True)]
    (made / "scores.json").write_text(json.dumps({"cap": 100, "scores": scores}))
    trace = Trace()
    for step in range(101):
        trace.record(step, 1.0 if step == 0 else 1.0 - drop + 0.0005 * (-1) ** step)
    trace.write(made / "trace.jsonl")
    return made


def test_a_method_that_learns_early_passes_with_the_figures_it_has(tmp_path: Path) -> None:
    ends = (0.68, 0.70, 0.72)
    runs = [run(tmp_path, seed, [0.1, 0.5, end, end], 0.1) for seed, end in enumerate(ends)]
    found = science.gate(runs)
    assert found["rankable"] is True
    assert found["start"] == pytest.approx(0.1)
    assert found["end"] == pytest.approx(0.7)
    assert found["standard errors"] == pytest.approx(0.6 / (0.02 / np.sqrt(3)))
    assert found["way to the ceiling, %"] == pytest.approx(75.0)
    assert found["gain before half the cap, %"] == pytest.approx(100.0)
    # Differences of the last tenth are +-0.001, five each way: a standard deviation of 0.001 or little less.
    assert found["drop of L_det over its jitter"] == pytest.approx(0.1 / (0.001 / np.sqrt(2)), rel=0.02)


@pytest.mark.parametrize(
    ("identity", "drop"),
    [
        ([[0.1, 0.1, 0.15, 0.2]] * 3, 0.1),  # an eighth of the way
        ([[0.1, 0.1, 0.3, 0.7]] * 3, 0.1),  # a third of the gain by half of the cap
        ([[0.1, 0.5, 0.7, 0.7]] * 3, 0.001),  # L_det falls by no more than its jitter
        ([[0.1, 0.5, 0.7, 0.7], [0.1, 0.1, 0.1, 0.1], [0.1, 0.4, 0.5, 0.5]], 0.1),  # two standard errors
    ],
)
def test_each_condition_can_fail_by_itself(tmp_path: Path, identity: list[list[float]], drop: float) -> None:
    shaken = [[value + 0.001 * seed for value in row] for seed, row in enumerate(identity)]
    runs = [
        run(tmp_path, seed, row[:1] + moved[1:], drop)
        for seed, (row, moved) in enumerate(zip(identity, shaken, strict=True))
    ]
    assert science.gate(runs)["rankable"] is False


def test_what_was_frozen_is_what_ships() -> None:
    assert science.frozen() == json.loads(science.FROZEN.read_text()), (
        "weights or training settings changed: say why in LOG.md, then python -m pretraining.science freeze"
    )


def test_only_what_moves_the_training_is_frozen(monkeypatch) -> None:
    before, own = science.frozen(), science.settings
    monkeypatch.setattr(science, "settings", lambda name, method: own(name, method) | {"window": 7})
    assert science.frozen() == before
    monkeypatch.setattr(science, "settings", lambda name, method: own(name, method) | {"learning_rate": 7.0})
    changed = science.frozen()
    assert changed["weights"] == before["weights"]
    assert all(changed[method] != before[method] for method in before if method != "weights")
