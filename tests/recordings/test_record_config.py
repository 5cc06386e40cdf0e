"""Settings of `dvar record`, and the recordings that they ask for."""

from __future__ import annotations

from pathlib import Path

from dvar.config.methods import PAPER_METHODS
from dvar.mini import TUNING
from dvar.recordings.config import RecordConfig, record_problems
from dvar.recordings.spec import plan_recordings


def test_by_default_every_method_is_recorded_on_every_concept_but_those_for_tuning() -> None:
    recordings = plan_recordings(RecordConfig())
    assert {recording.method for recording in recordings} == set(PAPER_METHODS)
    assert len(recordings) == 48 * len(PAPER_METHODS)
    assert not {recording.concept for recording in recordings} & set(TUNING)
    assert {(recording.seed, recording.protocol, recording.pairing) for recording in recordings} == {
        (0, "cpu", "all pairs")
    }


def test_seeds_vary_slowest_and_methods_fastest() -> None:
    config = RecordConfig(methods=("textual-inversion", "dreambooth-lora"), concepts=("a", "b"), seeds=(0, 1))
    names = [recording.name for recording in plan_recordings(config)]
    assert names[:3] == ["textual-inversion/a/0", "dreambooth-lora/a/0", "textual-inversion/b/0"]
    assert names[4] == "textual-inversion/a/1"
    assert len(plan_recordings(RecordConfig(first=2))) == 2 * len(PAPER_METHODS)


def test_settings_of_the_file_and_of_the_command_reach_each_recording(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_text("learning-rate = 0.1\n")
    config = RecordConfig(
        methods=("textual-inversion",), concepts=("a",), quick=True, config=str(tmp_path / "settings.toml"), dino="d"
    )
    (recording,) = plan_recordings(config)
    assert recording.settings == (("learning_rate", 0.1),)
    assert (recording.protocol, recording.dino) == ("quick", "d")


def test_every_problem_of_the_settings_is_named() -> None:
    assert record_problems(RecordConfig()) == []
    config = RecordConfig(first=0, workers=0, pairing="both", config="settings.toml")  # type: ignore[arg-type]
    problems = record_problems(config)
    assert "first must be at least 1, got 0" in problems
    assert "pairing must be one of all pairs, row by row, got 'both'" in problems
    assert "workers must be at least 1, got 0" in problems
    assert problems[-1].startswith("settings are of one method, got textual-inversion, ")
    assert record_problems(RecordConfig(seeds=(0, -1))) == ["seeds must be at least 0, got -1"]
