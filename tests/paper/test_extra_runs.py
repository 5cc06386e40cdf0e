"""Experiments that train runs of their own, with the tiny model: what they measure; they go on after a kill."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_record import write_fake_record

from dvar.config.training import TrainingConfig
from dvar.errors import CheckpointError, FolderInUse
from dvar.locks import lock_folder
from dvar.paper.config import ReproduceConfig
from dvar.paper.experiments import randomness, training_batch, variants
from dvar.paper.extra_runs import ExtraRuns, train_to_cap
from dvar.paper.reproduce import reproduce
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.spec import RecordingSpec
from dvar.stopping.trace import Trace
from dvar.testing import tiny_concept
from dvar.training.loop import Series, Stopwatch
from dvar.training.personalise import prepare
from dvar.training.run import TrainingRun

STEPS, EVERY, COUNT = 10, 5, 10


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    tiny_concept(folder / "ball", images=2)
    (folder / "ball.json").write_text('{"noun": "mug"}')
    return folder


@pytest.fixture
def config(tiny_model: Path, concepts: Path, tmp_path: Path) -> TrainingConfig:
    extra_runs = ExtraRuns(tmp_path, quick=True, model=str(tiny_model), concepts=str(concepts))
    spec = extra_runs.recording_spec("figure5", resolution=32, learning_rate=0.05, train_batch_size=1)
    return replace(spec.config, output_dir=str(spec.folder), max_train_steps=STEPS, checkpointing_steps=4, window=8)


def measure_series(run: TrainingRun) -> Series:
    return randomness.measure_factors(run, COUNT, EVERY)


def record_tiny_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every recording of an experiment use images of the tiny model's size."""
    recording_spec = ExtraRuns.recording_spec

    def tiny(extra_runs: ExtraRuns, experiment: str) -> RecordingSpec:
        return recording_spec(extra_runs, experiment, resolution=32, train_batch_size=1)

    monkeypatch.setattr(ExtraRuns, "recording_spec", tiny)


def test_one_factor_is_drawn_again_and_the_others_are_fixed(config: TrainingConfig) -> None:
    run, _ = prepare(config)
    held, fresh = (run.draw(run.examples, stream, EVERY, 0, COUNT) for stream in ("held", randomness.SERIES))
    for name, fields in randomness.FACTORS.items():
        mixed = randomness.mix_draws(held, fresh, fields)
        for field in randomness.FACTORS["all"]:
            source = fresh if field in fields else held
            assert torch.equal(getattr(mixed, field), getattr(source, field)), (name, field)
    assert sorted(field for name, fields in randomness.FACTORS.items() if name != "all" for field in fields) == sorted(
        randomness.FACTORS["all"]
    )


def test_the_curves_of_a_run(config: TrainingConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_PART", 4)  # so that the batch is accumulated from unequal parts
    at, curves = randomness.read_factors(trace := train_to_cap(config, measure_series, print))
    assert at.tolist() == [0, 5, 10]
    assert set(curves) == {*randomness.ROWS, randomness.FROZEN}
    assert all(values.shape == (3, COUNT) for values in curves.values())
    # The first samples of the held batch are those of L_det.
    np.testing.assert_allclose(curves[randomness.HELD][:, :8], trace.samples[::EVERY], rtol=1e-5)
    assert not curves[randomness.PAIRED][0].any()
    assert curves[randomness.PAIRED][1:].all()
    for name in ("x", "y", "E(x)", "ε", "t", "all"):
        assert (curves[name] != curves[randomness.HELD]).any(axis=1).all(), name


def test_a_run_continues_where_it_was_killed_and_is_not_repeated(config: TrainingConfig, tmp_path: Path) -> None:
    uninterrupted = train_to_cap(config, measure_series, print)

    class Killed(Exception):
        pass

    def killed(run: TrainingRun) -> Series:
        measure = measure_series(run)

        def measure_until(step: int, watch: Stopwatch) -> Mapping[str, Any]:
            assert not torch.backends.cudnn.allow_tf32
            if step == 7:
                raise Killed
            return measure(step, watch)

        return measure_until

    apart = replace(config, output_dir=str(tmp_path / "apart"))
    with pytest.raises(Killed):
        train_to_cap(apart, killed, print)
    again = train_to_cap(apart, measure_series, print)

    def measurements(trace: Trace) -> list[dict[str, object]]:
        return [{name: value for name, value in record.items() if name != "seconds"} for record in trace.records]

    assert measurements(again) == measurements(uninterrupted)
    assert measurements(train_to_cap(apart, killed, print)) == measurements(uninterrupted)  # nothing is left to do
    with lock_folder(tmp_path / "apart"), pytest.raises(FolderInUse, match="is being written"):
        train_to_cap(apart, measure_series, print)
    with pytest.raises(CheckpointError, match="learning_rate"):
        train_to_cap(replace(apart, learning_rate=0.01), measure_series, print)


def test_figure_5_by_its_command(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(randomness._STEPS, True, 50)
    monkeypatch.setitem(randomness._SIZES, True, (2, 4))
    record_tiny_images(monkeypatch)
    lines: list[str] = []
    report = reproduce(
        ReproduceConfig(
            names=("figure5",),
            records=(str(tmp_path / "none"),),
            output_dir=str(tmp_path),
            quick=True,
            model=str(tiny_model),
            concepts_dir=str(concepts),
        ),
        lines.append,
    )
    content = json.loads((report.parent / "figure5.json").read_text(encoding="utf-8"))
    rows = content["tables"][0]["rows"]
    assert [(row["drawn anew"], row["batch"]) for row in rows] == [
        (row, size) for row in randomness.ROWS for size in (2, 4)
    ]
    assert "step 50 of 50" in lines
    for fact in (str(tiny_model), "1, the first by name (ball)", "50 steps", "A small run"):
        assert fact in content["tables"][0]["caption"], fact


def test_figure_9_accumulates_its_batches(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training_batch.SIZES, True, (1, 4))
    monkeypatch.setitem(training_batch.STEPS, True, 12)
    record_tiny_images(monkeypatch)
    result = training_batch.figure_9(ExtraRuns(tmp_path, quick=True, model=str(tiny_model), concepts=str(concepts)))
    rows = {row["batch"]: row for row in result.tables[0].data}
    assert {size: row["samples"] for size, row in rows.items()} == {1: 12, 4: 48}
    curves = {(row["batch"], row["series"]): row["value"] for row in result.plots[0].data}
    assert len(curves[4, "training loss"]) == 12
    # Accumulated or not, the samples of a step are numbered: the first of a batch of four is that of a batch of one.
    settings = json.loads(next(tmp_path.glob("figure9/batch-4/*/*/*/*/config.json")).read_text(encoding="utf-8"))
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (1, 4)
    assert "Batches of 1 and 4, accumulated 1 at a time" in result.tables[0].caption


def write_fake_recordings(extra_runs: ExtraRuns, specs: Sequence[RecordingSpec]) -> list[RecordedRun]:
    """Return fake runs in place of these recordings; SAM learns further, and a random word less."""
    runs = []
    for spec in specs:
        learned = {"sam": 5.0, "random-word": 200.0}.get(Path(spec.records).parent.name, 20.0)
        folder = write_fake_record(Path(spec.records), concept=spec.concept, cap=100, learned=learned)
        runs.append(RecordedRun.open(folder))
        if "random" in spec.records:
            (folder / "initializer.json").write_text('[{"word": "<it>", "initializer_token": "teapot"}]')
    return runs


def test_the_first_version_s_variants(concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtraRuns, "record", write_fake_recordings)
    extra_runs = ExtraRuns(tmp_path, quick=True, concepts=str(concepts))
    words = variants.compare_initializers(extra_runs)
    rows = {row["variant"]: row for row in words.tables[0].data}
    assert list(rows) == list(variants.INITIALIZERS)
    assert rows["random word"]["words"] == ["teapot"]
    assert (
        "On 1 concept, too few to compare with the paper, the random word does not end as well" in words.paragraphs[0]
    )
    assert "The worst word by CLIP is the class noun itself on every concept here" in words.paragraphs[0]
    rows = {row["variant"]: row for row in variants.compare_optimizers(extra_runs).tables[0].data}
    assert rows["SAM"]["Train CLIP img"][0] > rows["AdamW"]["Train CLIP img"][0]


def test_a_variant_differs_in_its_own_settings_and_in_nothing_else(tmp_path: Path) -> None:
    extra_runs = ExtraRuns(tmp_path, quick=False)
    every = {**variants.INITIALIZERS, **variants.OPTIMIZERS}
    runs = {name: specs[0] for name, specs in variants.plan_variants(extra_runs, every).items()}
    assert runs[variants.CLASS_NOUN] == runs["AdamW"]
    usual = runs[variants.CLASS_NOUN].conditions["settings"]
    for name, run in runs.items():
        changed = {key for key, value in run.conditions["settings"].items() if value != usual[key]}
        assert changed - {"initializer_token"} == set(every[name]), name
        run.validate()
    assert len({run.folder for run in runs.values()}) == 5
