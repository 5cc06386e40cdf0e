"""Experiments that train runs of their own, with the tiny model: what they measure; they go on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_record import fake_record

from dvar.config.training import AnyConfig
from dvar.errors import CheckpointError
from dvar.paper.config import ReproduceConfig
from dvar.paper.experiments import randomness, training_batch, variants
from dvar.paper.extra_runs import ExtraRuns, trained
from dvar.paper.reproduce import reproduce
from dvar.recordings.archive import RecordedRun
from dvar.testing import tiny_concept
from dvar.training.personalise import prepared
from dvar.training.run import TrainingRun

STEPS, EVERY, COUNT = 10, 5, 10


@pytest.fixture(scope="module")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concepts")
    tiny_concept(folder / "ball", pictures=2)
    (folder / "ball" / "concept.json").write_text('{"noun": "mug"}')
    return folder


@pytest.fixture
def config(tiny_model: Path, concepts: Path, tmp_path: Path) -> AnyConfig:
    bench = ExtraRuns(tmp_path, quick=True, model=str(tiny_model), concepts=str(concepts))
    planned = bench.planned("figure5", resolution=32, learning_rate=0.05, train_batch_size=1)
    small = {"max_train_steps": STEPS, "checkpointing_steps": 4, "window": 8}
    return replace(planned.config, output_dir=str(planned.folder), **small)


def series(job: TrainingRun) -> object:
    return randomness.redrawn(job, COUNT, EVERY)


def test_one_factor_is_drawn_anew_and_the_others_are_held(config: AnyConfig) -> None:
    job, _ = prepared(config)
    held, fresh = (job.drawn(job.examples, stream, EVERY, 0, COUNT) for stream in ("held", randomness.SERIES))
    for name, fields in randomness.FACTORS.items():
        mixed = randomness._with(held, fresh, fields)
        for field in randomness.FACTORS["all"]:
            source = fresh if field in fields else held
            assert torch.equal(getattr(mixed, field), getattr(source, field)), (name, field)
    assert sorted(field for name, fields in randomness.FACTORS.items() if name != "all" for field in fields) == sorted(
        randomness.FACTORS["all"]
    )


def test_the_curves_of_a_run(config: AnyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_PART", 4)  # so that the batch is accumulated from unequal parts
    at, curves = randomness.read(trace := trained(config, series, print))
    assert at.tolist() == [0, 5, 10]
    assert set(curves) == {*randomness.ROWS, randomness.FROZEN}
    assert all(values.shape == (3, COUNT) for values in curves.values())
    # The first samples of the held batch are those of L_det.
    np.testing.assert_allclose(curves[randomness.HELD][:, :8], trace.samples[::EVERY], rtol=1e-5)
    assert not curves[randomness.PAIRED][0].any()
    assert curves[randomness.PAIRED][1:].all()
    for name in ("x", "y", "E(x)", "ε", "t", "all"):
        assert (curves[name] != curves[randomness.HELD]).any(axis=1).all(), name


def test_a_trial_goes_on_where_it_was_killed_and_is_not_made_twice(config: AnyConfig, tmp_path: Path) -> None:
    whole = trained(config, series, print)

    class Killed(Exception):
        pass

    def killed(job: TrainingRun) -> object:
        measured = randomness.redrawn(job, COUNT, EVERY)

        def until(step: int, watch: object) -> object:
            if step == 7:
                raise Killed
            return measured(step, watch)  # type: ignore[arg-type]

        return until

    apart = replace(config, output_dir=str(tmp_path / "apart"))
    with pytest.raises(Killed):
        trained(apart, killed, print)  # type: ignore[arg-type]
    again = trained(apart, series, print)

    def told(trace: object) -> list[dict[str, object]]:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in trace.records]  # type: ignore[attr-defined]

    assert told(again) == told(whole)
    assert told(trained(apart, killed, print)) == told(whole)  # type: ignore[arg-type]  # nothing is left to do
    with pytest.raises(CheckpointError, match="learning_rate"):
        trained(replace(apart, learning_rate=0.01), series, print)


def test_figure_5_by_its_command(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(randomness._STEPS, True, 50)
    monkeypatch.setitem(randomness._SIZES, True, (2, 4))
    planned = ExtraRuns.planned
    small = {"resolution": 32, "train_batch_size": 1}
    monkeypatch.setattr(ExtraRuns, "planned", lambda bench, name: planned(bench, name, **small))
    told: list[str] = []
    report = reproduce(
        ReproduceConfig(
            names=("figure5",),
            records=(str(tmp_path / "none"),),
            output_dir=str(tmp_path),
            quick=True,
            model=str(tiny_model),
            concepts_dir=str(concepts),
        ),
        told.append,
    )
    content = json.loads((report.parent / "figure5.json").read_text(encoding="utf-8"))
    rows = content["tables"][0]["rows"]
    assert [(row["drawn anew"], row["batch"]) for row in rows] == [
        (row, size) for row in randomness.ROWS for size in (2, 4)
    ]
    assert "step 50 of 50" in told
    for fact in (str(tiny_model), "1, the first by name (ball)", "50 steps", "A small run"):
        assert fact in content["tables"][0]["caption"], fact


def test_figure_9_accumulates_its_batches(
    tiny_model: Path, concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(training_batch.SIZES, True, (1, 4))
    monkeypatch.setitem(training_batch.STEPS, True, 12)
    planned = ExtraRuns.planned
    small = {"resolution": 32, "train_batch_size": 1}
    monkeypatch.setattr(ExtraRuns, "planned", lambda bench, name: planned(bench, name, **small))
    exhibit = training_batch.make(ExtraRuns(tmp_path, quick=True, model=str(tiny_model), concepts=str(concepts)))
    rows = {row["batch"]: row for row in exhibit.tables[0].data}
    assert {size: row["samples"] for size, row in rows.items()} == {1: 12, 4: 48}
    curves = {(one["batch"], one["series"]): one["value"] for one in exhibit.plots[0].data}
    assert len(curves[4, "training loss"]) == 12
    # Accumulated or not, the samples of a step are numbered through: the first of four is the one of one.
    settings = json.loads(next(tmp_path.glob("figure9/batch-4/*/*/*/*/config.json")).read_text(encoding="utf-8"))
    assert (settings["train_batch_size"], settings["gradient_accumulation_steps"]) == (1, 4)
    assert "Batches of 1 and 4, accumulated 1 at a time" in exhibit.tables[0].caption


def faked(bench: ExtraRuns, recordings: list) -> list[RecordedRun]:  # type: ignore[type-arg]
    """Records of these recordings without any training; SAM learns further, a random word less far."""
    found = []
    for one in recordings:
        learned = {"sam": 5.0, "random-word": 200.0}.get(Path(one.records).parent.name, 20.0)
        found.append(RecordedRun.open(fake_record(Path(one.records), concept=one.concept, cap=100, learned=learned)))
        if "random" in one.records:
            (found[-1].folder / "initializer.json").write_text('[{"word": "<it>", "initializer_token": "teapot"}]')
    return found


def test_the_first_version_s_variants(concepts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExtraRuns, "recorded", faked)
    bench = ExtraRuns(tmp_path, quick=True, concepts=str(concepts))
    words = variants.initial(bench)
    rows = {row["variant"]: row for row in words.tables[0].data}
    assert list(rows) == list(variants.STARTS)
    assert rows["random word"]["words"] == ["teapot"]
    assert "Unlike in the paper, it is not so here that the random word ends as well" in words.says[0]
    assert "As in the paper, the best word by CLIP ends as well" in words.says[0]
    rows = {row["variant"]: row for row in variants.sam(bench).tables[0].data}
    assert rows["SAM"]["Train CLIP img"][0] > rows["AdamW"]["Train CLIP img"][0]


def test_a_variant_differs_in_what_it_says_and_in_nothing_else(tmp_path: Path) -> None:
    bench = ExtraRuns(tmp_path, quick=False)
    every = {**variants.STARTS, **variants.OPTIMIZERS}
    runs = {name: of[0] for name, of in variants.planned(bench, every).items()}
    assert runs[variants.USUAL] == runs["AdamW"]
    usual = runs[variants.USUAL].facts["settings"]
    for name, run in runs.items():
        changed = {key for key, value in run.facts["settings"].items() if value != usual[key]}
        assert changed - {"initializer_token"} == set(every[name]), name
        run.check()
    assert len({run.folder for run in runs.values()}) == 4
