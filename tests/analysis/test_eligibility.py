"""The gate before rules are ranked, on runs made up so that each figure is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, fake_record

from dvar.analysis.eligibility import ENOUGH, Eligibility, gate_of
from dvar.recordings.archive import RecordingArchive

STEPS, CAP = (0, 25, 50, 100), 100
TUNING = tuple(f"tuning_{number}" for number in range(ENOUGH))


def loss(drop: float) -> np.ndarray:
    """L_det falls by ``drop`` at once and then jumps up and down by 0.001 about its end."""
    return np.array([1.0, *(1.0 - drop + 0.0005 * (-1) ** step for step in range(1, CAP + 1))])


def test_a_method_that_learns_early_passes_with_the_figures_it_has() -> None:
    found = Eligibility.of(CAP, STEPS, [[0.1, 0.5, end, end] for end in (0.68, 0.70, 0.72)], [loss(0.1)] * 3, 0.9)
    assert not found.failed
    assert (found.start, found.end, found.early) == (pytest.approx(0.1), pytest.approx(0.7), pytest.approx(1.0))
    assert found.errors == pytest.approx(0.6 / (0.02 / np.sqrt(3)))
    assert found.way == pytest.approx(0.75)
    # Differences of the last tenth are +-0.001, five each way: a standard deviation of 0.001 or little less.
    assert found.jitters == pytest.approx(0.1 / (0.001 / np.sqrt(2)), rel=0.02)


@pytest.mark.parametrize(
    ("said", "scores", "drop"),
    [
        ("15 % of the way", [[0.1, 0.15, 0.22, 0.22]] * 3, 0.1),
        ("33 % of its gain by half", [[0.1, 0.1, 0.3, 0.7]] * 3, 0.1),
        ("times its jitter", [[0.1, 0.5, 0.7, 0.7]] * 3, 0.001),
        ("1.7 standard errors", [[0.1, 0.5, 0.7, 0.7], [0.1, 0.1, 0.1, 0.1], [0.1, 0.4, 0.4, 0.4]], 0.1),
    ],
)
def test_each_condition_can_fail_by_itself(said: str, scores: list[list[float]], drop: float) -> None:
    failed = Eligibility.of(CAP, STEPS, scores, [loss(drop)] * 3, 0.9).failed
    assert len(failed) == 1
    assert said in failed[0]


def test_one_run_cannot_fail_by_an_error_it_has_not() -> None:
    assert np.isnan((found := Eligibility.of(CAP, STEPS, [[0.1, 0.5, 0.7, 0.7]], [loss(0.1)])).errors)
    assert np.isnan(found.way)
    assert not found.failed


def shelf(root: Path, tuning: int, **given: float) -> RecordingArchive:
    for concept in TUNING[:tuning]:
        fake_record(root, "custom-diffusion", concept, cap=700, **given)
    fake_record(root, "custom-diffusion", "vase", cap=700)
    return RecordingArchive.open(root, TUNING)


def test_enough_tuning_records_judge_the_method_up_to_baselines_cap(tmp_path: Path) -> None:
    found = gate_of(shelf(tmp_path, ENOUGH, learned=40.0), "custom-diffusion")
    assert found is not None
    assert (found.runs, found.cap) == (ENOUGH, 500)  # records go on to 700
    assert (found.start, found.end) == (pytest.approx(START), pytest.approx(START + GAIN, abs=1e-3))
    assert not found.failed
    late = gate_of(shelf(tmp_path / "late", ENOUGH, learned=400.0), "custom-diffusion")
    assert late is not None
    assert "of its gain by half of the cap" in late.failed[0]


def test_with_fewer_the_bundled_model_has_its_own_and_another_model_has_none(tmp_path: Path) -> None:
    few = shelf(tmp_path, ENOUGH - 1)
    found = gate_of(few, "custom-diffusion")
    assert found is not None
    assert found.early == pytest.approx(0.614, abs=1e-3)  # measured when the settings were frozen
    for record in few:
        record.config["pretrained_model_name_or_path"] = "another"  # type: ignore[index]
    assert gate_of(few, "custom-diffusion") is None


def test_where_a_judge_knows_the_subjects_its_identity_is_what_counts(tmp_path: Path) -> None:
    known = shelf(tmp_path, ENOUGH)
    for record in known:
        rise = 0.2 + 0.6 * (1 - np.exp(-record.scored_steps / 40))
        record.pictures["train", "identity"] = np.tile(rise[:, None], 8)  # type: ignore[index]
    found = gate_of(known, "custom-diffusion")
    assert found is not None
    assert (found.start, found.end, found.ceiling) == (pytest.approx(0.2), pytest.approx(0.8, abs=1e-3), 1.0)
    assert found.way == pytest.approx(0.75, abs=1e-3)
