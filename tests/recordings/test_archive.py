"""Reading recorded runs: every series as it was written, and nothing that is incomplete."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, TIMESTEPS, space_scored_steps, write_fake_record

from dvar.errors import RefusedInput
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.mixture import base_model_problems
from dvar.recordings.recorded_run import RecordedRun, RescoredRun


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fake_record(tmp_path, cap=100, every=10)


def test_a_recorded_run_is_named_by_its_folder(folder: Path) -> None:
    run = RecordedRun.open(folder)
    assert (run.method, run.concept, run.seed, run.cap) == ("textual-inversion", "red_mug", 0, 100)
    assert run.name == "textual-inversion/red_mug/0"


def test_series_have_their_own_cadence_and_width(folder: Path) -> None:
    run = RecordedRun.open(folder)
    shapes = {name: run.series(name)[1].shape for name in ("eval", "train_loss", "stratified", "unseen", "drift")}
    assert shapes == {
        "eval": (101, len(TIMESTEPS)),
        "train_loss": (100, 1),
        "stratified": (11, 32),
        "unseen": (11, 8),
        "drift": (11, 1),
    }
    assert run.series("stratified")[0].tolist() == list(range(0, 101, 10))
    np.testing.assert_array_equal(run.series("eval")[1].mean(axis=1), run.trace.values)


def test_paired_is_fresh_minus_frozen(folder: Path) -> None:
    run = RecordedRun.open(folder)
    steps, paired = run.series("paired")
    fresh, frozen = run.series("fresh")[1], run.series("frozen")[1]
    np.testing.assert_array_equal(paired, fresh - frozen)
    assert not paired[0].any()  # the untouched model is the frozen one
    assert (paired[1:] < 0).all()
    assert len(steps) == 11
    assert run.has_series("paired")


def test_each_image_has_a_score(folder: Path) -> None:
    steps, values = RecordedRun.open(folder).scores("train", "clip_image")
    assert steps.tolist() == space_scored_steps(100)
    np.testing.assert_allclose(values[0], START)
    np.testing.assert_allclose(values[-1], START + GAIN * (1 - np.exp(-100 / 60)))
    assert values.shape == (len(steps), 8)


def test_unit_seconds_are_medians(folder: Path) -> None:
    # 0.2 s an update, 0.1 s for 8 held samples, 8 s for 16 images
    assert RecordedRun.open(folder).unit_seconds == pytest.approx({"train": 0.2, "forward": 0.0125, "picture": 0.5})


@pytest.mark.parametrize("name", ["trace.jsonl", "scores.json"])
def test_what_was_changed_after_recording_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RefusedInput, match=f"{name} is not what was recorded"):
        RecordedRun.open(folder)


@pytest.mark.parametrize("name", ["done.json", "config.json"])
def test_an_unfinished_recording_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RefusedInput, match=f"{name} is missing"):
        RecordedRun.open(folder)


def test_an_unknown_series_or_score_names_those_there_are(folder: Path) -> None:
    run = RecordedRun.open(folder)
    with pytest.raises(RefusedInput, match="no series 'evil': it has drift, eval, fresh"):
        run.series("evil")
    with pytest.raises(RefusedInput, match="no score train dino: it has train clip_image, train clip_text"):
        run.scores("train", "dino")


@pytest.mark.parametrize("content", ['{"hashes": 0.5}', '{"hashes": {"trace.jsonl": 3}}', '{"threads": "one"}', "[]"])
def test_an_end_of_another_shape_is_damage_of_this_recording_alone(content: str, tmp_path: Path) -> None:
    write_fake_record(tmp_path, concept="red_mug", cap=40)
    damaged = write_fake_record(tmp_path, concept="blue_dog", cap=40)
    (damaged / "done.json").write_text(content)
    archive = RecordingArchive.open(tmp_path)
    assert [run.concept for run in archive] == ["red_mug"]
    assert archive.unreadable["textual-inversion/blue_dog/0"].startswith("done.json must be JSON")


def test_measured_seconds_of_another_shape_are_refused(tmp_path: Path) -> None:
    write_fake_record(tmp_path, cap=40)
    (tmp_path / "seconds.json").write_text('{"textual-inversion": 3.0}')
    with pytest.raises(RefusedInput, match=r"seconds\.json must be JSON"):
        RecordingArchive.open(tmp_path)


def test_joined_archives_take_a_run_from_the_first_that_has_it(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "other"
    write_fake_record(first, concept="red_mug", cap=40)
    damaged = write_fake_record(first, concept="blue_dog", cap=40)
    (damaged / "done.json").write_text("{")
    for concept in ("red_mug", "blue_dog", "green_car"):
        write_fake_record(second, concept=concept, cap=60)
    (first / "seconds.json").write_text('{"textual-inversion": {"train": 1.0}}')
    (second / "seconds.json").write_text('{"textual-inversion": {"train": 2.0}, "custom-diffusion": {"train": 3.0}}')
    rescored = RescoredRun(np.array([3]), {("train", "clip_image"): np.ones((1, 8))})
    complete = RecordingArchive.open(second)
    complete = replace(complete, rescored={run.name: rescored for run in complete})
    archive = RecordingArchive.join([RecordingArchive.open(first), complete])
    assert {run.concept: run.cap for run in archive} == {"blue_dog": 60, "green_car": 60, "red_mug": 40}
    assert not archive.unreadable
    assert archive.measured_seconds == {"textual-inversion": {"train": 1.0}, "custom-diffusion": {"train": 3.0}}
    assert {name.split("/")[1] for name in archive.rescored} == {"blue_dog", "green_car"}, (
        "another run's are not its own"
    )
    assert [run.name for run in RecordingArchive.join([complete])] == [run.name for run in complete]


def test_an_archive_has_every_run_that_can_be_read_and_names_why_the_others_cannot(tmp_path: Path) -> None:
    write_fake_record(tmp_path, cap=40)
    write_fake_record(tmp_path, "dreambooth-lora", cap=40)
    write_fake_record(tmp_path, concept="purple_cat", cap=40)
    damaged, failed = write_fake_record(tmp_path, seed=1, cap=40), write_fake_record(tmp_path, seed=2, cap=40)
    (damaged / "done.json").write_text("{")
    (failed / "done.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"reason": "the loss was not finite at step 3"}))
    archive = RecordingArchive.open(tmp_path)
    assert archive.methods == ("textual-inversion", "dreambooth-lora")
    assert [run.name for run in archive.runs_of("textual-inversion")] == ["textual-inversion/red_mug/0"]
    assert [run.concept for run in archive.tuning_runs("textual-inversion")] == ["purple_cat"]
    assert archive.unreadable["textual-inversion/red_mug/2"] == "the loss was not finite at step 3"
    assert archive.unreadable["textual-inversion/red_mug/1"].startswith("done.json must be JSON")
    assert len(archive) == 3


def test_measured_seconds_replace_the_medians(tmp_path: Path) -> None:
    write_fake_record(tmp_path, cap=40, seconds=0.2)
    write_fake_record(tmp_path, concept="blue_cup", cap=40, seconds=0.4)
    assert RecordingArchive.open(tmp_path).unit_seconds("textual-inversion")["train"] == pytest.approx(0.3)
    (tmp_path / "seconds.json").write_text(json.dumps({"textual-inversion": {"train": 0.1, "start_up": 3.0}}))
    units = RecordingArchive.open(tmp_path).unit_seconds("textual-inversion")
    assert (units["train"], units["start_up"], units["picture"]) == (0.1, 3.0, 0.5)


def test_a_folder_without_recordings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no recorded runs in"):
        RecordingArchive.open(tmp_path)


def test_runs_of_two_base_models_under_one_name_are_named(tmp_path: Path) -> None:
    for index, base in enumerate(["a" * 64] * 4 + ["b" * 64]):
        write_fake_record(tmp_path, seed=index, cap=20, header={"base": base})
    runs = RecordingArchive.open(tmp_path).runs
    assert base_model_problems(runs[:4]) == []
    (problem,) = base_model_problems(runs)
    name = "textual-inversion/red_mug"
    assert problem == (
        f"base model mini must be one and the same, got aaaaaaaaaaaa ({name}/0, {name}/1, {name}/2 and 1 more) "
        f"and bbbbbbbbbbbb ({name}/4): name the records of one alone"
    )
    older = write_fake_record(tmp_path, seed=9, cap=20)
    (problem,) = base_model_problems([runs[0], RecordedRun.open(older)])
    assert f"a model from before headers named it ({name}/9)" in problem
    config = json.loads((older / "config.json").read_text())
    (older / "config.json").write_text(json.dumps({**config, "pretrained_model_name_or_path": "owner/name"}))
    assert base_model_problems([runs[0], RecordedRun.open(older)]) == []
