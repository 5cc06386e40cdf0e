"""The reader of recorded runs: every series as it was written, and nothing that is not whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_record import GAIN, START, TIMESTEPS, fake_record, scored_steps

from dvar.errors import RefusedInput
from dvar.recordings.archive import RecordedRun, RecordingArchive, RescoredRun


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fake_record(tmp_path, cap=100, every=10)


def test_a_record_is_named_by_its_folder(folder: Path) -> None:
    record = RecordedRun.open(folder)
    assert (record.method, record.concept, record.seed, record.cap) == ("textual-inversion", "red_mug", 0, 100)
    assert record.name == "textual-inversion/red_mug/0"


def test_series_have_their_own_cadence_and_width(folder: Path) -> None:
    record = RecordedRun.open(folder)
    shapes = {name: record.series(name)[1].shape for name in ("eval", "train_loss", "stratified", "unseen", "drift")}
    assert shapes == {
        "eval": (101, len(TIMESTEPS)),
        "train_loss": (100, 1),
        "stratified": (11, 32),
        "unseen": (11, 8),
        "drift": (11, 1),
    }
    assert record.series("stratified")[0].tolist() == list(range(0, 101, 10))
    np.testing.assert_array_equal(record.series("eval")[1].mean(axis=1), record.trace.values)


def test_paired_is_fresh_minus_frozen(folder: Path) -> None:
    record = RecordedRun.open(folder)
    steps, paired = record.series("paired")
    fresh, frozen = record.series("fresh")[1], record.series("frozen")[1]
    np.testing.assert_array_equal(paired, fresh - frozen)
    assert not paired[0].any()  # the untouched model is the frozen one
    assert (paired[1:] < 0).all()
    assert len(steps) == 11
    assert record.has("paired")


def test_scores_are_one_per_picture(folder: Path) -> None:
    steps, values = RecordedRun.open(folder).scores("train", "clip_image")
    assert steps.tolist() == scored_steps(100)
    np.testing.assert_allclose(values[0], START)
    np.testing.assert_allclose(values[-1], START + GAIN * (1 - np.exp(-100 / 60)))
    assert values.shape == (len(steps), 8)


def test_unit_seconds_are_medians(folder: Path) -> None:
    # 0.2 s an update, 0.1 s for 8 held samples, 8 s for 16 pictures
    assert RecordedRun.open(folder).seconds == pytest.approx({"train": 0.2, "forward": 0.0125, "picture": 0.5})


@pytest.mark.parametrize("name", ["trace.jsonl", "scores.json"])
def test_what_was_changed_after_recording_is_refused(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(RefusedInput, match=f"{name} is not what was recorded"):
        RecordedRun.open(folder)


@pytest.mark.parametrize("name", ["done.json", "config.json"])
def test_an_unfinished_record_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(RefusedInput, match=f"{name} is missing"):
        RecordedRun.open(folder)


def test_an_unknown_series_or_score_names_those_there_are(folder: Path) -> None:
    record = RecordedRun.open(folder)
    with pytest.raises(RefusedInput, match="no series 'evil': it has drift, eval, fresh"):
        record.series("evil")
    with pytest.raises(RefusedInput, match="no score train dino: it has train clip_image, train clip_text"):
        record.scores("train", "dino")


def test_joined_shelves_read_a_run_from_the_first_that_has_it(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    fake_record(one, concept="red_mug", cap=40)
    damaged = fake_record(one, concept="blue_dog", cap=40)
    (damaged / "done.json").write_text("{")
    for concept in ("red_mug", "blue_dog", "green_car"):
        fake_record(other, concept=concept, cap=60)
    (one / "seconds.json").write_text('{"textual-inversion": {"train": 1.0}}')
    (other / "seconds.json").write_text('{"textual-inversion": {"train": 2.0}, "custom-diffusion": {"train": 3.0}}')
    anew = RescoredRun(np.array([3]), {("train", "clip_image"): np.ones((1, 8))})
    whole = RecordingArchive.open(other)
    whole = replace(whole, rescored={record.name: anew for record in whole})
    shelf = RecordingArchive.joined([RecordingArchive.open(one), whole])
    assert {record.concept: record.cap for record in shelf} == {"blue_dog": 60, "green_car": 60, "red_mug": 40}
    assert not shelf.lost
    assert shelf.seconds == {"textual-inversion": {"train": 1.0}, "custom-diffusion": {"train": 3.0}}
    assert {name.split("/")[1] for name in shelf.rescored} == {"blue_dog", "green_car"}, "another run's are not its own"
    assert [record.name for record in RecordingArchive.joined([whole])] == [record.name for record in whole]


def test_a_shelf_keeps_what_it_can_read_and_says_why_the_rest_is_lost(tmp_path: Path) -> None:
    fake_record(tmp_path, cap=40)
    fake_record(tmp_path, "dreambooth-lora", cap=40)
    fake_record(tmp_path, concept="purple_cat", cap=40)
    damaged, failed = fake_record(tmp_path, seed=1, cap=40), fake_record(tmp_path, seed=2, cap=40)
    (damaged / "done.json").write_text("{")
    (failed / "done.json").unlink()
    (failed / "failed.json").write_text(json.dumps({"reason": "the loss was not finite at step 3"}))
    shelf = RecordingArchive.open(tmp_path)
    assert shelf.methods == ("textual-inversion", "dreambooth-lora")
    assert [record.name for record in shelf.of("textual-inversion")] == ["textual-inversion/red_mug/0"]
    assert [record.concept for record in shelf.for_tuning("textual-inversion")] == ["purple_cat"]
    assert shelf.lost["textual-inversion/red_mug/2"] == "the loss was not finite at step 3"
    assert shelf.lost["textual-inversion/red_mug/1"].startswith("done.json must be JSON")
    assert len(shelf) == 3


def test_seconds_measured_apart_replace_the_medians(tmp_path: Path) -> None:
    fake_record(tmp_path, cap=40, seconds=0.2)
    fake_record(tmp_path, concept="blue_cup", cap=40, seconds=0.4)
    assert RecordingArchive.open(tmp_path).units("textual-inversion")["train"] == pytest.approx(0.3)
    (tmp_path / "seconds.json").write_text(json.dumps({"textual-inversion": {"train": 0.1, "start_up": 3.0}}))
    units = RecordingArchive.open(tmp_path).units("textual-inversion")
    assert (units["train"], units["start_up"], units["picture"]) == (0.1, 3.0, 0.5)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no recorded runs in"):
        RecordingArchive.open(tmp_path)
