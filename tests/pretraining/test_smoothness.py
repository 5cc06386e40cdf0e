"""What is kept of a run for the plot of training before and after: its held loss and how its gradients are spread."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dvar.stopping.trace import Trace
from pretraining import smoothness
from pretraining.smoothness import LEVELS, describe, of_folder, summarise


def test_a_run_is_summarised_relative_to_its_first_loss_and_its_median_gradient() -> None:
    losses = np.full(201, 0.4)
    losses[0], losses[150] = 0.5, 0.51
    norms = np.full(1000, 2.0)
    norms[700] = 100.0
    run = summarise("a", np.arange(201), losses, norms)
    assert run["losses"][0] == 1
    assert len(run["losses"]) == len(run["steps"]) == smoothness.POINTS
    assert run["fall"] == pytest.approx(0.2)
    assert run["climbs"]
    assert run["largest"] == 50
    assert run["shares"] == [0.001 if level < 50 else 0 for level in LEVELS]
    losses[150] = 0.5  # not above
    calm = summarise("b", np.arange(201), losses, np.full(1000, 2.0))
    assert not calm["climbs"]
    assert describe([run, calm]) == (
        "2 runs: L_det climbs above its first value after its minimum in 1; the largest gradient is 26 times the "
        "median of its run (median over runs), more than 30 times in 1"
    )


def test_a_climb_before_the_minimum_is_none() -> None:
    losses = np.array([1.0, 1.2, 0.8, 0.9])
    assert not summarise("a", np.arange(4), losses, np.ones(4))["climbs"]


def test_what_was_kept_is_plotted_beside_a_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace()
    for step in range(40):
        trace.record(step, [1 - 0.01 * step], **({"grad_norm": 1.0 + step % 3} if step else {}))
    trace.write(tmp_path / "trace.jsonl")
    before = smoothness.read()["before"]
    assert len(before) == 16
    smoothness.plot({"before": before, "after": [of_folder(tmp_path)]}, tmp_path / "plot" / "smoothness.svg")
    assert (tmp_path / "plot" / "smoothness.svg").read_text().startswith("<?xml")
