"""Recordings of the tiny model: their content, that measuring changes nothing, and that they survive any kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.analysis.strategies import Strategy
from dvar.errors import CheckpointError, ModelError, RefusedInput
from dvar.files import write_json
from dvar.paper.experiments.replay_check import check_replay
from dvar.paper.extra_runs import ExtraRuns
from dvar.recordings import spec
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.protocol import CAP_FACTORS, PLACES, PROTOCOLS, RecordingProtocol, ScoringPrompts, log_spaced_steps
from dvar.recordings.record import read_resumable_scores, record_run
from dvar.recordings.recorded_run import RecordedRun, RescoredRun
from dvar.recordings.rescore import _missing_steps, rescore_archive, rescore_steps
from dvar.recordings.restore import (
    RESCORED_SHEETS,
    _replay,
    read_sheet,
    restore_model,
    restore_runs,
    sheet_path,
    weights_path,
    write_sheet,
)
from dvar.recordings.score_samples import find_missing_rounds, generate_images, load_scorer
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import read_status
from dvar.stopping.rules import Dvar, FixedSteps, Plateau
from dvar.stopping.trace import Trace
from dvar.testing import tiny_clip, tiny_concept
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise

METHODS = ("textual-inversion", "dreambooth-lora", "custom-diffusion")
CAP = 12
SETTINGS: dict[str, Any] = {
    "resolution": 32,
    "num_inference_steps": 2,
    "num_validation_images": 1,
    "validation_steps": 100,
    "window": 8,
    "threshold": 1e-9,
    "learning_rate": 0.05,
}
OWN = {"custom-diffusion": {"num_class_images": 2, "max_grad_norm": None}}


@pytest.fixture(scope="session")
def concepts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one concept, a mug."""
    folder = tmp_path_factory.mktemp("concepts")
    tiny_concept(folder / "ball", images=3)
    (folder / "ball.json").write_text('{"noun": "mug"}')
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("judges") / "clip")


@pytest.fixture(scope="module", autouse=True)
def tiny_plan() -> Iterator[None]:
    """The preset "cpu" made small."""
    every = {"stratified": 4, "fresh": 3, "unseen": 4, "drift": 6}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROTOCOLS, "cpu", RecordingProtocol(1.0, 4, 2, 2, 2, every))
        patch.setattr(spec, "CHECKPOINTS", 3)
        yield


Make = Callable[..., RecordingSpec]


@pytest.fixture(scope="module")
def spec_maker(tiny_model: Path, concepts: Path, clip: Path) -> Make:
    def make(method: str, records: Path, **changed: Any) -> RecordingSpec:
        cap = round(CAP / CAP_FACTORS[method])
        settings = {**SETTINGS, **OWN.get(method, {}), "max_train_steps": cap, **changed.pop("settings", {})}
        paths = {"model": str(tiny_model), "concepts": str(concepts), "clip": str(clip), "records": str(records)}
        return RecordingSpec(method, "ball", **{**paths, **changed}, settings=tuple(settings.items()))

    return make


@pytest.fixture
def make_spec(spec_maker: Make, tmp_path: Path) -> Make:
    """Specifications of recordings that a test makes itself."""
    return lambda method="textual-inversion", **changed: spec_maker(method, tmp_path / "r", **changed)


@pytest.fixture(scope="module")
def finished(spec_maker: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's finished recording, recorded once; tests must not change it."""
    records = tmp_path_factory.mktemp("finished")
    return cache(lambda method: record_run(spec_maker(method, records)))


@pytest.fixture
def copied(finished: Callable[[str], Path], make_spec: Make) -> Callable[[str], Path]:
    """A copy of it among the recordings of `make_spec`, for tests that change it."""

    def copy(method: str) -> Path:
        shutil.copytree(finished(method), make_spec(method).folder)
        return make_spec(method).folder

    return copy


def read_contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_rows(folder: Path, *, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Return the records of a run without the seconds and the named fields."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in row.items() if name not in ("seconds", *but)} for row in records]


def read_scores(folder: Path) -> list[dict[str, Any]]:
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


SERIES = ("stratified", "fresh", "frozen", "fresh_timesteps", "unseen", "drift", "stable_rank", "token_norm", "images")


@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_run_is_the_trainer_s_run_bit_for_bit(
    make_spec: Make, finished: Callable[[str], Path], method: str, tmp_path: Path
) -> None:
    config = make_spec(method).config
    assert config.max_train_steps == CAP
    plain, folder = personalise(replace(config, output_dir=str(tmp_path / "plain"))).folder, finished(method)
    assert read_rows(folder, but=SERIES) == read_rows(plain)
    names = [path.name for path in plain.glob("*.safetensors") if "steps" not in path.name]
    assert names
    for name in names:
        learned, same = load_file(folder / name), load_file(plain / name)
        assert learned.keys() == same.keys()
        assert all(torch.equal(learned[key], same[key]) for key in learned)


def test_recording_leaves_the_global_random_state(make_spec: Make) -> None:
    state = torch.get_rng_state()
    record_run(make_spec())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rule_that_stops_a_plain_run_cuts_the_recorded_one_at_that_step(make_spec: Make, tmp_path: Path) -> None:
    recording = make_spec(settings={"threshold": 0.9999, "max_train_steps": 20})
    folder = record_run(recording)
    plain = personalise(replace(recording.config, output_dir=str(tmp_path / "plain")))
    assert plain.steps < 20
    assert read_rows(plain.folder) == read_rows(folder, but=SERIES)[: plain.steps + 1]
    learned = load_file(weights_path(folder, plain.steps))["<thing>"]
    assert torch.equal(learned, load_file(plain.weights[0])["<thing>"])


def test_the_content_of_a_recorded_run(make_spec: Make, finished: Callable[[str], Path]) -> None:
    recording, run = make_spec("dreambooth-lora"), RecordedRun.open(finished("dreambooth-lora"))
    assert (run.method, run.concept, run.seed, run.cap) == ("dreambooth-lora", "ball", 0, CAP)
    assert run.series("eval")[0].tolist() == list(range(CAP + 1))
    for name, every, width in (("stratified", 4, 32), ("fresh", 3, 8), ("frozen", 3, 8), ("drift", 6, 1)):
        steps, values = run.series(name)
        assert steps.tolist() == list(range(0, CAP + 1, every))
        assert values.shape == (len(steps), width)
        assert np.isfinite(values).all()
        assert run.trace.header["series"][name]["every"] == every
    assert not run.has_series("unseen")
    assert run.series("token_norm")[1].shape == (CAP + 1, 1)
    strata = run.trace.header["series"]["stratified"]["timesteps"]
    assert [timestep * 32 // 1000 for timestep in strata] == list(range(32))
    assert run.series("fresh_timesteps")[1].shape == (5, 8)
    assert len({tuple(timesteps) for timesteps in run.series("fresh_timesteps")[1].tolist()}) == 5
    assert run.scored_steps.tolist() == recording.scored_steps == [0, 4, 7, 12]
    for part in ("train", "validation"):
        for metric in ("clip_image", "clip_text"):
            assert run.scores(part, metric)[1].shape == (4, 4)
        assert run.scores(part, "clip_image")[1].std(axis=0).min() > 0
    assert run.header["sampling_steps"] == 2
    assert run.series("images")[0].tolist() == run.scored_steps.tolist()
    assert run.series("images")[1].shape == (4, 64)
    assert run.header["protocol"] == {"name": "cpu", "version": 1}
    assert run.header["setting"]["learning_rate"] == {"value": 0.05, "preset": 1e-3}
    assert len(run.header["base"]) == 64
    assert run.header["seeds"] == [0, 1, 2, 3]
    assert run.header["validation_prompts"][1:3] == [
        "a photo of the <thing> on the beach",
        "a photo of the <thing> in the snow",
    ]
    assert run.header["validation_texts"][2] == "a photo of the mug in the snow"
    assert not any("<thing>" in text for text in run.header["train_texts"])
    assert {"train", "probe", "stratified", "fresh", "drift", "score", "other"} == {
        part for row in run.trace.records for part in row["seconds"]
    }
    for step in recording.scored_steps:
        sheet = read_sheet(run.folder / "pictures" / f"step-{step:06d}.png")  # type: ignore[operator]
        assert [len(row) for row in sheet] == [4, 4]


@pytest.mark.parametrize("method", METHODS)
def test_the_gain_over_the_frozen_model_is_nothing_before_the_first_update(
    finished: Callable[[str], Path], method: str
) -> None:
    run = RecordedRun.open(finished(method))
    _, paired = run.series("paired")
    _, drift = run.series("drift")
    assert not paired[0].any()
    assert paired[1:].any(axis=1).all()
    assert drift[0] == 0
    # A new word alone changes nothing of what the class's own words give.
    assert bool(drift[1:].any()) == (method != "textual-inversion")


class Killed(BaseException):
    """The process dies here: nothing after it is executed."""


def kill_at(step: int) -> Callable[[StepRecord], None]:
    def kill(record: StepRecord) -> None:
        if record.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(11, marks=pytest.mark.slow)])
def test_a_recording_killed_at_any_step_continues_bit_for_bit(
    make_spec: Make, finished: Callable[[str], Path], step: int
) -> None:
    straight, recording, steps = finished("dreambooth-lora"), make_spec("dreambooth-lora"), list[int]()
    with pytest.raises(Killed):
        record_run(recording, [kill_at(step)])
    assert not (recording.folder / "done.json").exists()
    folder = record_run(recording, [lambda record: steps.append(record.step)])
    assert steps[0] == step // 4 * 4 + 1
    assert read_rows(folder) == read_rows(straight)
    assert read_scores(folder) == read_scores(straight)
    checkpoints = sorted((straight / "weights").iterdir())
    assert [path.name for path in sorted((folder / "weights").iterdir())] == [path.name for path in checkpoints]
    for path in checkpoints:
        learned, same = load_file(folder / "weights" / path.name), load_file(path)
        assert all(torch.equal(learned[key], same[key]) for key in same)
    RecordedRun.open(folder)


@pytest.mark.parametrize("damage", ["scores.json", "weights/step-000004.safetensors", "recording.json"])
def test_an_interrupted_recording_that_lost_a_file_is_repeated(
    make_spec: Make, copied: Callable[[str], Path], damage: str
) -> None:
    folder, recording = copied("dreambooth-lora"), make_spec("dreambooth-lora")
    assert read_resumable_scores(recording) is None  # it is finished
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")
    assert [row["step"] for row in read_resumable_scores(recording) or ()] == [0, 4, 7]
    (folder / damage).unlink()
    assert read_resumable_scores(recording) is None


def test_a_recording_older_than_a_setting_was_made_with_its_default(
    make_spec: Make, copied: Callable[[str], Path]
) -> None:
    folder = copied("textual-inversion")
    conditions = json.loads((folder / "recording.json").read_text())
    del conditions["settings"]["validation_scheduler"]
    (folder / "recording.json").write_text(json.dumps(conditions))
    assert make_spec().find_conflict() == ""
    conditions["settings"]["validation_scheduler"] = "DDIMScheduler"
    (folder / "recording.json").write_text(json.dumps(conditions))
    assert "another settings" in make_spec().find_conflict()


def test_another_recording_is_refused_and_not_changed(make_spec: Make, copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    before = read_contents(folder)
    with pytest.raises(RefusedInput, match="recorded under another settings"):
        record_run(make_spec(length=2.0))
    with pytest.raises(RefusedInput, match="recorded under another judged"):
        record_run(make_spec(pairing="row by row"))
    for text in ('{"settings": 3}', "[]", ""):
        (folder / "recording.json").write_text(text)
        assert "holds a run that was not recorded" in make_spec().find_conflict()
    (folder / "recording.json").unlink()
    with pytest.raises(RefusedInput, match="holds a run that was not recorded"):
        record_run(make_spec())
    before.pop(folder / "recording.json")
    assert read_contents(folder) == before


@pytest.mark.parametrize("method", METHODS)
def test_any_step_can_be_replayed_bit_for_bit(copied: Callable[[str], Path], method: str) -> None:
    folder = copied(method)
    weights = load_file(weights_path(folder, 7))
    loaded = read_weights(restore_model(folder, 7), weights)
    weights_path(folder, 7).unlink()
    before = read_contents(folder)
    replayed = read_weights(restore_model(folder, 7), weights)
    for name in weights:
        assert torch.equal(loaded[name], weights[name])
        assert torch.equal(replayed[name], weights[name])
    assert read_contents(folder) == before


@pytest.mark.parametrize(
    ("device", "factor", "fits"),
    [("cpu", 1.0, True), ("cpu", 1.001, False), ("cuda", 1.001, True), ("cuda", 1.1, False)],
)
def test_a_replay_is_compared_with_the_record_on_every_device(
    device: str, factor: float, fits: bool, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint-0").mkdir()
    update = SimpleNamespace(train_loss=0.25 * factor)
    run: Any = SimpleNamespace(
        backbone=SimpleNamespace(device=torch.device(device)),
        learner=SimpleNamespace(update=lambda losses, number: update),
        training_losses=None,
    )
    with (
        nullcontext()
        if fits
        else pytest.raises(CheckpointError, match=r"step 1 gave the loss .*, and 0.25 was recorded")
    ):
        _replay(run, tmp_path, 0, 1, {1: 0.25})


def test_steps_are_restored_in_order_whether_their_weights_were_kept_or_not(copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    steps = (0, 2, 3, 5, 7, 8, 12)
    apart = {
        step: restore_model(folder, step).text_encoder.get_input_embeddings().rows.detach().clone() for step in steps
    }
    saved = {step for step in steps if weights_path(folder, step).exists()}
    assert saved
    assert saved != set(steps)
    along = restore_runs(folder, steps[::-1])
    for step, job in zip(steps, along, strict=True):
        assert torch.equal(job.backbone.text_encoder.get_input_embeddings().rows, apart[step]), step
    assert len({rows.numpy().tobytes() for rows in apart.values()}) == len(steps)
    # Kept weights come without what the optimizer knows: a step behind them is trained from a checkpoint.
    behind = restore_model(folder, 11).text_encoder.get_input_embeddings().rows.detach().clone()
    shutil.copy(weights_path(folder, 7), weights_path(folder, 10))
    *_, last = restore_runs(folder, [9, 10, 11])
    assert torch.equal(last.backbone.text_encoder.get_input_embeddings().rows, behind)


def read_weights(backbone: Any, saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights of a model under the names of ``saved``."""
    weights = {f"unet.{name.replace('.default', '')}": weight for name, weight in backbone.denoiser.named_parameters()}
    weights |= dict(backbone.denoiser.named_parameters())
    rows = backbone.text_encoder.get_input_embeddings().rows
    return {name: (rows if name.startswith("<") else weights[name]).detach() for name in saved}


def test_a_replay_that_differs_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    trace = Trace.read(folder / "trace.jsonl")
    changed = Trace(trace.header)
    for row in trace.records:
        changed.record(**{**row, **({"train_loss": row["train_loss"] + 1e-9} if row["step"] == 6 else {})})
    changed.write(folder / "trace.jsonl")
    restore_model(folder, 5)
    with pytest.raises(CheckpointError, match="step 6 gave the loss"):
        restore_model(folder, 6)
    with pytest.raises(RefusedInput, match="between 0 and 12"):
        restore_model(folder, 13)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_rescored_on_fresh_seeds(copied: Callable[[str], Path], make_spec: Make, method: str) -> None:
    folder = copied(method)
    header = json.loads((folder / "scores.json").read_text())["header"]
    rescore_steps(folder, [7])
    content = json.loads((folder / "rescored.json").read_text())
    assert len(content["header"]["seeds"]) == len(header["seeds"])
    assert not set(content["header"]["seeds"]) & set(header["seeds"])
    job = next(restore_runs(folder, [7]))
    images = generate_images(job, header["validation_prompts"], content["header"]["seeds"], header["sampling_steps"])
    by_hand = load_scorer(make_spec(method), job.concept)(images, header["validation_texts"])
    rescored = RescoredRun.open(folder)
    assert rescored is not None
    assert rescored.steps.tolist() == [7]
    assert rescored.image_scores["validation", "clip_text"].tolist() == [by_hand["clip_text"]]
    assert rescored.mean(7, "validation", "clip_image") == pytest.approx(np.mean(by_hand["clip_image"]))
    assert np.isnan(rescored.mean(7, "train", "dino"))
    sheet = read_sheet(sheet_path(folder, 7, RESCORED_SHEETS))[1]
    assert [np.array(image).tobytes() for image in sheet] == [np.array(image).tobytes() for image in images]


def test_rescored_steps_are_kept_and_belong_to_their_run(copied: Callable[[str], Path], make_spec: Make) -> None:
    folder = copied("textual-inversion")
    rescore_steps(folder, [7])
    first = json.loads((folder / "rescored.json").read_text())["rows"]
    rescore_steps(folder, [3, 7])
    rescored = RescoredRun.open(folder)
    assert rescored is not None
    assert rescored.steps.tolist() == [3, 7]
    assert json.loads((folder / "rescored.json").read_text())["rows"][:1] == first
    (folder / "scores.json").write_text("{}")  # a damaged recording is made again, without what was rescored
    record_run(make_spec())
    assert not (folder / "rescored.json").exists()
    write_json(folder / "rescored.json", {"header": {"hashes": {}, "seeds": []}, "rows": first})
    assert RescoredRun.open(folder) is None
    (folder / "rescored.json").write_text('{"header": ')
    assert RescoredRun.open(folder) is None


@pytest.fixture
def thrice(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function that gives the protocol three rounds of images; what `finished` makes before has one."""
    return lambda: monkeypatch.setitem(PROTOCOLS, "cpu", replace(PROTOCOLS["cpu"], rounds=3))


@pytest.mark.parametrize("method", METHODS)
def test_a_finished_run_gets_the_images_that_its_protocol_asks_for_now(
    copied: Callable[[str], Path], make_spec: Make, method: str, thrice: Callable[[], None]
) -> None:
    folder, recording = copied(method), make_spec(method)
    before, first = read_contents(folder), RecordedRun.open(folder)
    assert read_status(recording).state == "done"
    thrice()
    assert read_status(recording).reason == f"images of {len(first.scored_steps)} steps are still to be generated"
    record_run(recording)
    assert read_status(recording).state == "done"
    after = read_contents(folder)
    assert {path for path in after if after[path] != before.get(path)} == {folder / "rounds.json"}
    run = RecordedRun.open(folder)
    assert (first.image_count, run.image_count) == (4, 12)
    for which, values in first.image_scores.items():
        assert run.image_scores[which][:, :4].tolist() == values.tolist()
    header = run.header
    assert header["seeds"] == list(range(12))
    assert [header["train_prompts"][index::2] for index in (0, 1)] == [header["train_prompts"][::2]] * 2
    assert (run.scoring_seconds > first.scoring_seconds).all()
    # As its model generates them by hand.
    step = int(run.scored_steps[1])
    job = next(restore_runs(folder, [step]))
    images = generate_images(job, header["validation_prompts"][8:], header["seeds"][8:], header["sampling_steps"])
    by_hand = load_scorer(recording, job.concept)(images, header["validation_texts"][8:])
    assert run.image_scores["validation", "clip_image"][1, 8:].tolist() == by_hand["clip_image"]


def test_rounds_continue_after_a_kill_and_count_once_every_step_has_them(
    copied: Callable[[str], Path], make_spec: Make, thrice: Callable[[], None]
) -> None:
    folder, recording = copied("textual-inversion"), make_spec()
    thrice()
    record_run(recording)
    complete, path = RecordedRun.open(folder), folder / "rounds.json"
    content = json.loads(path.read_text())
    truncated = {"header": content["header"], "rows": content["rows"][:-1]}  # the last step has one more round, not two
    write_json(path, truncated)
    assert RecordedRun.open(folder).image_count == 8
    assert find_missing_rounds(recording) == {CAP: [2]}
    record_run(recording)
    again = json.loads(path.read_text())["rows"]
    assert again[:-1] == truncated["rows"]
    for which, values in complete.image_scores.items():
        assert RecordedRun.open(folder).image_scores[which].tolist() == values.tolist()


@pytest.mark.parametrize("damage", ["{", '{"header": {"hashes": {}}, "rows": []}', '{"rows": []}', "[]"])
def test_rounds_that_are_damaged_or_of_another_run_are_generated_again(
    copied: Callable[[str], Path], make_spec: Make, thrice: Callable[[], None], damage: str
) -> None:
    folder = copied("textual-inversion")
    thrice()
    (folder / "rounds.json").write_text(damage)
    write_json(folder / "failed.json", {"reason": "the disk was full"})
    assert read_status(make_spec()).reason == "the disk was full"
    assert RecordedRun.open(folder).image_count == 4
    record_run(make_spec())
    assert RecordedRun.open(folder).image_count == 12
    assert read_status(make_spec()).state == "done"
    (folder / "scores.json").write_text("{}")  # a damaged recording is made again, and its images too
    record_run(make_spec())
    assert RecordedRun.open(folder).image_count == 12


def test_a_checkpoint_that_was_rescored_on_fewer_images_is_rescored_again(
    copied: Callable[[str], Path], make_spec: Make, thrice: Callable[[], None]
) -> None:
    folder = copied("textual-inversion")
    rescore_steps(folder, [3, 7])
    thrice()
    record_run(make_spec())
    few = RescoredRun.open(folder)
    assert few is not None
    assert few.image_count == 4
    archive = RecordingArchive.open(folder.parents[2])
    assert _missing_steps(archive, next(iter(archive)), {3}) == [3]
    rescore_steps(folder, [3])
    run = RescoredRun.open(folder)
    assert run is not None
    assert (run.steps.tolist(), run.image_count) == ([3], 12)
    for which, values in run.image_scores.items():  # on the same seeds and others
        # In other batches a pixel may round otherwise (1e-5 of a cosine on some CPUs); other seeds are 1e-2 apart.
        np.testing.assert_allclose(values[0, :4], few.image_scores[which][0], atol=2e-4)


def test_a_run_that_an_experiment_needs_is_found_among_the_recordings(
    copied: Callable[[str], Path], make_spec: Make, tmp_path: Path
) -> None:
    folder = copied("textual-inversion")
    bench = ExtraRuns(tmp_path, quick=False, records=Path(make_spec().records))
    planned = replace(make_spec(), records=str(tmp_path / "own"))
    assert bench.reuse_recorded(planned) == make_spec()
    for other in (replace(planned, seed=1), replace(planned, settings=(*planned.settings, ("adam_beta1", 0.8)))):
        assert bench.reuse_recorded(other) == other
    (folder / "scores.json").write_text("{}")
    assert bench.reuse_recorded(planned) == planned
    assert ExtraRuns(tmp_path, quick=False).reuse_recorded(planned) == planned


@pytest.mark.slow
def test_checkpoints_of_several_runs_are_rescored_at_once(copied: Callable[[str], Path]) -> None:
    folders = [copied(method) for method in METHODS[:2]]
    archive, lines = RecordingArchive.open(folders[0].parents[2]), list[str]()
    whole, broken = (next(record for record in archive if record.method == method) for method in METHODS[:2])
    for path in folders[1].glob("checkpoint-*"):
        shutil.rmtree(path)
    steps_by_run = {record: {0, 5} for record in archive}
    rescored = rescore_archive(archive, steps_by_run, lines.append)
    assert lines[0].startswith("4 checkpoints of 2 runs to rescore, about ")
    assert any(line.startswith(f"{broken.name}: ") and "no checkpoint before step 5" in line for line in lines)
    assert {name: run.steps.tolist() for name, run in rescored.rescored.items()} == {
        whole.name: [0, 5],
        broken.name: [0],
    }
    intact = {record: steps for record, steps in steps_by_run.items() if record is not broken}
    assert rescore_archive(rescored, intact, lines.append) is rescored  # nothing is missing
    assert RecordingArchive.open(folders[0].parents[2]).rescored.keys() == rescored.rescored.keys()


def test_input_that_cannot_be_recorded_is_refused_before_training(
    make_spec: Make, concepts: Path, clip: Path, tmp_path: Path
) -> None:
    def refused(match: str, kind: type[Exception] = RefusedInput, **changed: Any) -> None:
        with pytest.raises(kind, match=match):
            record_run(replace(make_spec(), **changed))

    lonely = tmp_path / "lonely"
    shutil.copytree(concepts, lonely)
    for path in sorted((lonely / "ball").glob("*.png"))[1:]:
        path.unlink()
    refused("one image, and a concept that is scored needs two", concepts=str(lonely))
    (lonely / "ball.json").write_text("{}")
    refused("must hold", concepts=str(lonely))
    refused("holds no concepts", concepts=str(tmp_path))
    refused("no concept 'bal', the nearest is ball", concept="bal")
    refused("method must be one of", method="hypernetwork")
    refused("preset must be one of quick, cpu, panel, full", protocol="huge")
    refused("needs a constant learning rate", settings=(*make_spec().settings, ("lr_scheduler", "cosine")))
    refused("does not load as a CLIP", ModelError, clip=str(tmp_path / "nowhere"))
    small = tiny_clip(tmp_path / "small")
    processor = json.loads((small / "preprocessor_config.json").read_text())
    processor["crop_size"] = {"height": 24, "width": 24}
    (small / "preprocessor_config.json").write_text(json.dumps(processor))
    refused("its processor makes 24x24, it reads 32", ModelError, clip=str(small))
    assert not list((tmp_path / "r").rglob("trace.jsonl"))


def test_log_spaced_steps_begin_at_0_end_at_the_cap_and_grow_by_equal_ratios() -> None:
    steps = log_spaced_steps(6100, 40)
    assert (steps[0], steps[-1], len(steps)) == (0, 6100, 40)
    ratios = [later / earlier for earlier, later in pairwise(steps[10:])]
    assert max(ratios) / min(ratios) < 1.05
    assert all(step % 5 == 0 for step in log_spaced_steps(1500, 40, 5))
    assert log_spaced_steps(3, 40) == [0, 3]


def test_the_two_halves_of_the_images_share_their_prompts_and_no_seed() -> None:
    prompts = ScoringPrompts.for_prompts(["a <thing>", "my <thing>"], "<thing>", "mug", 4, ["beach", "snow"])
    assert prompts.prompts[::2] == prompts.prompts[1::2]
    assert len(set(prompts.seeds)) == len(prompts.prompts) == 8
    assert prompts.texts[:5] == ("a mug",) * 4 + ("my mug",)
    assert prompts.places == ("beach",) * 4 + ("snow",) * 4


def test_validation_places_have_the_words_of_the_bundled_world() -> None:
    from dvar.mini.world.places import PLACES as ALL

    assert {name: ALL[name].words for name in PLACES} == PLACES


def test_a_sheet_returns_its_images(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    rows = [[Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)] for _ in range(2)]
    write_sheet(tmp_path / "sheet.png", rows)
    for row, read in zip(rows, read_sheet(tmp_path / "sheet.png"), strict=True):
        assert [image.tobytes() for image in row] == [image.tobytes() for image in read]


def test_a_run_that_breaks_is_not_a_finished_recording(make_spec: Make) -> None:
    from dvar.errors import NonFiniteLoss

    recording = make_spec(settings={"learning_rate": 1e30})
    with pytest.raises(NonFiniteLoss):
        record_run(recording)
    assert not (recording.folder / "done.json").exists()


# Evaluating and running


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_evaluating_a_strategy_is_running_it(method: str, finished: Callable[[str], Path]) -> None:
    """Two rules that stop on the way, and one that never does: the true run ends at the same step, bit for bit."""
    run = RecordedRun.open(finished(method))
    for rule in (FixedSteps(5), Plateau("eval", 8, 1e9), Dvar(8, 1e-9)):
        check = check_replay(run, Strategy("way", rule))
        assert check.stop == check.read.stop
        assert check.equal, check.differing
        assert check.seconds > 0
        assert check.spread[0] <= check.expected <= check.spread[1]
    assert torch.get_num_threads() == 1
