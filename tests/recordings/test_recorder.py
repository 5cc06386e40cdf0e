"""Recorded runs of the tiny model: what they hold, that measuring changes nothing, and that any kill is survived."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.analysis.strategies import Strategy
from dvar.errors import CheckpointError, ModelError, RefusedInput
from dvar.files import write_json
from dvar.paper.experiments.replay_check import agreement
from dvar.paper.extra_runs import ExtraRuns
from dvar.recordings import spec
from dvar.recordings.archive import RecordedRun, RecordingArchive, RescoredRun
from dvar.recordings.protocol import PLACES, PROTOCOLS, RecordingProtocol, ScoringPrompts, log_spaced
from dvar.recordings.recorder import record, scores_to_go_on_from
from dvar.recordings.rescore import _missing, rescore, with_rescored
from dvar.recordings.restore import ANEW, learned_along, learned_at, read_sheet, sheet_at, weights_at, write_sheet
from dvar.recordings.score_samples import drawn, lacking, scorer_of
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import standing
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
    tiny_concept(folder / "ball", pictures=3)
    (folder / "ball" / "concept.json").write_text('{"noun": "mug"}')
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
def make(tiny_model: Path, concepts: Path, clip: Path) -> Make:
    def described(method: str, records: Path, **changed: Any) -> RecordingSpec:
        cap = round(CAP / spec.PAST[method])
        given = {**SETTINGS, **OWN.get(method, {}), "max_train_steps": cap, **changed.pop("settings", {})}
        told = {"model": str(tiny_model), "concepts": str(concepts), "clip": str(clip), "records": str(records)}
        return RecordingSpec(method, "ball", **{**told, **changed}, settings=tuple(given.items()))

    return described


@pytest.fixture
def one(make: Make, tmp_path: Path) -> Make:
    """A recording of a test's own, not made yet."""
    return lambda method="textual-inversion", **changed: make(method, tmp_path / "r", **changed)


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a method's finished recording, made once: not to be changed."""
    records = tmp_path_factory.mktemp("finished")
    return cache(lambda method: record(make(method, records)))


@pytest.fixture
def copied(finished: Callable[[str], Path], one: Make) -> Callable[[str], Path]:
    """The same, to be changed: it stands where the recordings of `one` do."""

    def copy(method: str) -> Path:
        shutil.copytree(finished(method), one(method).folder)
        return one(method).folder

    return copy


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder: Path, *, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The records of a run, every field but the seconds and those named."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in row.items() if name not in ("seconds", *but)} for row in records]


def scores(folder: Path) -> list[dict[str, Any]]:
    found = json.loads((folder / "scores.json").read_text())["rows"]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found]


SERIES = ("stratified", "fresh", "frozen", "fresh_timesteps", "unseen", "drift", "token_norm")


@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_run_is_the_trainer_s_run_bit_for_bit(
    one: Make, finished: Callable[[str], Path], method: str, tmp_path: Path
) -> None:
    config = one(method).config
    assert config.max_train_steps == CAP
    plain, folder = personalise(replace(config, output_dir=str(tmp_path / "plain"))).folder, finished(method)
    assert rows(folder, but=SERIES) == rows(plain)
    names = [path.name for path in plain.glob("*.safetensors") if "steps" not in path.name]
    assert names
    for name in names:
        learned, same = load_file(folder / name), load_file(plain / name)
        assert learned.keys() == same.keys()
        assert all(torch.equal(learned[key], same[key]) for key in learned)


def test_recording_leaves_the_global_random_state(one: Make) -> None:
    state = torch.get_rng_state()
    record(one())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_rule_that_stops_a_plain_run_cuts_the_recorded_one_at_that_step(one: Make, tmp_path: Path) -> None:
    recording = one(settings={"threshold": 0.9999, "max_train_steps": 20})
    folder = record(recording)
    plain = personalise(replace(recording.config, output_dir=str(tmp_path / "plain")))
    assert plain.steps < 20
    assert rows(plain.folder) == rows(folder, but=SERIES)[: plain.steps + 1]
    learned = load_file(weights_at(folder, plain.steps))["<thing>"]
    assert torch.equal(learned, load_file(plain.weights[0])["<thing>"])


def test_what_a_recorded_run_holds(one: Make, finished: Callable[[str], Path]) -> None:
    recording, found = one("dreambooth-lora"), RecordedRun.open(finished("dreambooth-lora"))
    assert (found.method, found.concept, found.seed, found.cap) == ("dreambooth-lora", "ball", 0, CAP)
    assert found.series("eval")[0].tolist() == list(range(CAP + 1))
    for name, every, width in (("stratified", 4, 32), ("fresh", 3, 8), ("frozen", 3, 8), ("drift", 6, 1)):
        steps, values = found.series(name)
        assert steps.tolist() == list(range(0, CAP + 1, every))
        assert values.shape == (len(steps), width)
        assert np.isfinite(values).all()
        assert found.trace.header["series"][name]["every"] == every
    assert not found.has("unseen")
    assert found.series("token_norm")[1].shape == (CAP + 1, 1)
    strata = found.trace.header["series"]["stratified"]["timesteps"]
    assert [timestep * 32 // 1000 for timestep in strata] == list(range(32))
    assert found.series("fresh_timesteps")[1].shape == (5, 8)
    assert len({tuple(drawn) for drawn in found.series("fresh_timesteps")[1].tolist()}) == 5
    assert found.scored_steps.tolist() == recording.scored == [0, 4, 7, 12]
    for part in ("train", "validation"):
        for metric in ("clip_image", "clip_text"):
            assert found.scores(part, metric)[1].shape == (4, 4)
        assert found.scores(part, "clip_image")[1].std(axis=0).min() > 0
    assert found.header["sampling_steps"] == 2
    assert found.header["seeds"] == [0, 1, 2, 3]
    assert found.header["validation_prompts"][1:3] == [
        "a photo of the <thing> on the beach",
        "a photo of the <thing> in the snow",
    ]
    assert found.header["validation_texts"][2] == "a photo of the mug in the snow"
    assert not any("<thing>" in text for text in found.header["train_texts"])
    assert {"train", "probe", "stratified", "fresh", "drift", "score", "other"} == {
        part for row in found.trace.records for part in row["seconds"]
    }
    for step in recording.scored:
        sheet = read_sheet(found.folder / "pictures" / f"step-{step:06d}.png")  # type: ignore[operator]
        assert [len(row) for row in sheet] == [4, 4]


@pytest.mark.parametrize("method", METHODS)
def test_the_gain_over_the_frozen_model_is_nothing_before_the_first_update(
    finished: Callable[[str], Path], method: str
) -> None:
    found = RecordedRun.open(finished(method))
    _, paired = found.series("paired")
    _, drift = found.series("drift")
    assert not paired[0].any()
    assert paired[1:].any(axis=1).all()
    assert drift[0] == 0
    # A new word alone changes nothing of what the class's own words give.
    assert bool(drift[1:].any()) == (method != "textual-inversion")


class Killed(BaseException):
    """The process dies here: nothing after it is carried out."""


def killed_at(step: int) -> Callable[[StepRecord], None]:
    def kill(seen: StepRecord) -> None:
        if seen.step == step:
            raise Killed

    return kill


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(11, marks=pytest.mark.slow)])
def test_a_recording_killed_at_any_step_goes_on_bit_for_bit(
    one: Make, finished: Callable[[str], Path], step: int
) -> None:
    straight, recording, seen = finished("dreambooth-lora"), one("dreambooth-lora"), list[int]()
    with pytest.raises(Killed):
        record(recording, [killed_at(step)])
    assert not (recording.folder / "done.json").exists()
    folder = record(recording, [lambda made: seen.append(made.step)])
    assert seen[0] == step // 4 * 4 + 1
    assert rows(folder) == rows(straight)
    assert scores(folder) == scores(straight)
    kept = sorted((straight / "weights").iterdir())
    assert [path.name for path in sorted((folder / "weights").iterdir())] == [path.name for path in kept]
    for path in kept:
        learned, same = load_file(folder / "weights" / path.name), load_file(path)
        assert all(torch.equal(learned[key], same[key]) for key in same)
    RecordedRun.open(folder)


@pytest.mark.parametrize("damage", ["scores.json", "weights/step-000004.safetensors", "recording.json"])
def test_an_interrupted_recording_that_lost_something_is_made_anew(
    one: Make, copied: Callable[[str], Path], damage: str
) -> None:
    folder, recording = copied("dreambooth-lora"), one("dreambooth-lora")
    assert scores_to_go_on_from(recording) is None  # it is finished
    (folder / "done.json").unlink()
    shutil.rmtree(folder / "checkpoint-12")
    assert [row["step"] for row in scores_to_go_on_from(recording) or ()] == [0, 4, 7]
    (folder / damage).unlink()
    assert scores_to_go_on_from(recording) is None


def test_a_recording_from_before_a_setting_existed_was_made_under_its_default(
    one: Make, copied: Callable[[str], Path]
) -> None:
    folder = copied("textual-inversion")
    facts = json.loads((folder / "recording.json").read_text())
    del facts["settings"]["validation_scheduler"]
    (folder / "recording.json").write_text(json.dumps(facts))
    assert one().foreign() == ""
    assert "another settings" in one(settings={"validation_scheduler": "DDIMScheduler"}).foreign()


def test_what_is_not_this_recording_is_left_alone(one: Make, copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    before = contents(folder)
    with pytest.raises(RefusedInput, match="recorded under another settings"):
        record(one(settings={"learning_rate": 0.01}))
    with pytest.raises(RefusedInput, match="recorded under another judged"):
        record(one(pairing="row by row"))
    (folder / "recording.json").unlink()
    with pytest.raises(RefusedInput, match="holds a run that was not recorded"):
        record(one())
    before.pop(folder / "recording.json")
    assert contents(folder) == before


@pytest.mark.parametrize("method", METHODS)
def test_any_step_can_be_replayed_bit_for_bit(copied: Callable[[str], Path], method: str) -> None:
    folder = copied(method)
    kept = load_file(weights_at(folder, 7))
    loaded = trained(learned_at(folder, 7), kept)
    weights_at(folder, 7).unlink()
    before = contents(folder)
    replayed = trained(learned_at(folder, 7), kept)
    for name in kept:
        assert torch.equal(loaded[name], kept[name])
        assert torch.equal(replayed[name], kept[name])
    assert contents(folder) == before


def test_steps_are_had_back_in_order_whether_kept_or_not(copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    steps = (0, 2, 3, 5, 7, 8, 12)
    apart = {step: learned_at(folder, step).text_encoder.get_input_embeddings().rows.detach().clone() for step in steps}
    kept = {step for step in steps if weights_at(folder, step).exists()}
    assert kept
    assert kept != set(steps)
    along = learned_along(folder, steps[::-1])
    for step, job in zip(steps, along, strict=True):
        assert torch.equal(job.backbone.text_encoder.get_input_embeddings().rows, apart[step]), step
    assert len({rows.numpy().tobytes() for rows in apart.values()}) == len(steps)
    # Kept weights come without what the optimizer knows: a step behind them is trained from a checkpoint.
    behind = learned_at(folder, 11).text_encoder.get_input_embeddings().rows.detach().clone()
    shutil.copy(weights_at(folder, 7), weights_at(folder, 10))
    *_, last = learned_along(folder, [9, 10, 11])
    assert torch.equal(last.backbone.text_encoder.get_input_embeddings().rows, behind)


def trained(backbone: Any, kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a model under the names of ``kept``."""
    found = {f"unet.{name.replace('.default', '')}": weight for name, weight in backbone.unet.named_parameters()}
    found |= dict(backbone.unet.named_parameters())
    rows = backbone.text_encoder.get_input_embeddings().rows
    return {name: (rows if name.startswith("<") else found[name]).detach() for name in kept}


def test_a_replay_that_differs_is_told(copied: Callable[[str], Path]) -> None:
    folder = copied("textual-inversion")
    trace = Trace.read(folder / "trace.jsonl")
    changed = Trace(trace.header)
    for row in trace.records:
        changed.record(**{**row, **({"train_loss": row["train_loss"] + 1e-9} if row["step"] == 6 else {})})
    changed.write(folder / "trace.jsonl")
    learned_at(folder, 5)
    with pytest.raises(CheckpointError, match="step 6 gave the loss"):
        learned_at(folder, 6)
    with pytest.raises(RefusedInput, match="between 0 and 12"):
        learned_at(folder, 13)


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_scored_anew_on_fresh_seeds(copied: Callable[[str], Path], one: Make, method: str) -> None:
    folder = copied(method)
    header = json.loads((folder / "scores.json").read_text())["header"]
    rescore(folder, [7])
    content = json.loads((folder / "rescored.json").read_text())
    assert len(content["header"]["seeds"]) == len(header["seeds"])
    assert not set(content["header"]["seeds"]) & set(header["seeds"])
    job = next(learned_along(folder, [7]))
    pictures = drawn(job, header["validation_prompts"], content["header"]["seeds"], header["sampling_steps"])
    by_hand = scorer_of(one(method), job.concept)(pictures, header["validation_texts"])
    anew = RescoredRun.open(folder)
    assert anew is not None
    assert anew.steps.tolist() == [7]
    assert anew.pictures["validation", "clip_text"].tolist() == [by_hand["clip_text"]]
    assert anew.mean(7, "validation", "clip_image") == pytest.approx(np.mean(by_hand["clip_image"]))
    assert np.isnan(anew.mean(7, "train", "dino"))
    kept = read_sheet(sheet_at(folder, 7, ANEW))[1]
    assert [np.array(picture).tobytes() for picture in kept] == [np.array(picture).tobytes() for picture in pictures]


def test_what_was_scored_anew_is_kept_and_belongs_to_its_run(copied: Callable[[str], Path], one: Make) -> None:
    folder = copied("textual-inversion")
    rescore(folder, [7])
    first = json.loads((folder / "rescored.json").read_text())["rows"]
    rescore(folder, [3, 7])
    anew = RescoredRun.open(folder)
    assert anew is not None
    assert anew.steps.tolist() == [3, 7]
    assert json.loads((folder / "rescored.json").read_text())["rows"][:1] == first
    (folder / "scores.json").write_text("{}")  # a damaged record is made anew, and with it goes what was scored
    record(one())
    assert not (folder / "rescored.json").exists()
    write_json(folder / "rescored.json", {"header": {"hashes": {}, "seeds": []}, "rows": first})
    assert RescoredRun.open(folder) is None
    (folder / "rescored.json").write_text('{"header": ')
    assert RescoredRun.open(folder) is None


@pytest.fixture
def thrice(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it gives the plan three rounds of pictures; what `finished` makes before has one."""
    return lambda: monkeypatch.setitem(PROTOCOLS, "cpu", replace(PROTOCOLS["cpu"], rounds=3))


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_run_has_the_pictures_drawn_that_its_plan_asks_for_now(
    copied: Callable[[str], Path], one: Make, method: str, thrice: Callable[[], None]
) -> None:
    folder, recording = copied(method), one(method)
    before, first = contents(folder), RecordedRun.open(folder)
    assert standing(recording).state == "done"
    thrice()
    assert standing(recording).reason == f"pictures of {len(first.scored_steps)} steps are still to be drawn"
    record(recording)
    assert standing(recording).state == "done"
    after = contents(folder)
    assert {path for path in after if after[path] != before.get(path)} == {folder / "rounds.json"}
    found = RecordedRun.open(folder)
    assert (first.count, found.count) == (4, 12)
    for which, values in first.pictures.items():
        assert found.pictures[which][:, :4].tolist() == values.tolist()
    header = found.header
    assert header["seeds"] == list(range(12))
    assert [header["train_prompts"][index::2] for index in (0, 1)] == [header["train_prompts"][::2]] * 2
    assert (found.scoring_seconds > first.scoring_seconds).all()
    # As its model draws them by hand.
    step = int(found.scored_steps[1])
    job = next(learned_along(folder, [step]))
    pictures = drawn(job, header["validation_prompts"][8:], header["seeds"][8:], header["sampling_steps"])
    by_hand = scorer_of(recording, job.concept)(pictures, header["validation_texts"][8:])
    assert found.pictures["validation", "clip_image"][1, 8:].tolist() == by_hand["clip_image"]


def test_pictures_go_on_after_a_kill_and_count_when_no_step_lacks_them(
    copied: Callable[[str], Path], one: Make, thrice: Callable[[], None]
) -> None:
    folder, recording = copied("textual-inversion"), one()
    thrice()
    record(recording)
    whole, path = RecordedRun.open(folder), folder / "rounds.json"
    content = json.loads(path.read_text())
    lost = {"header": content["header"], "rows": content["rows"][:-1]}  # the last step has one more round, not two
    write_json(path, lost)
    assert RecordedRun.open(folder).count == 8
    assert lacking(recording) == {CAP: [2]}
    record(recording)
    again = json.loads(path.read_text())["rows"]
    assert again[:-1] == lost["rows"]
    for which, values in whole.pictures.items():
        assert RecordedRun.open(folder).pictures[which].tolist() == values.tolist()


@pytest.mark.parametrize("damage", ["{", '{"header": {"hashes": {}}, "rows": []}', '{"rows": []}', "[]"])
def test_pictures_that_are_damaged_or_of_another_run_are_drawn_again(
    copied: Callable[[str], Path], one: Make, thrice: Callable[[], None], damage: str
) -> None:
    folder = copied("textual-inversion")
    thrice()
    (folder / "rounds.json").write_text(damage)
    write_json(folder / "failed.json", {"reason": "the disk was full"})
    assert standing(one()).reason == "the disk was full"
    assert RecordedRun.open(folder).count == 4
    record(one())
    assert RecordedRun.open(folder).count == 12
    assert standing(one()).state == "done"
    (folder / "scores.json").write_text("{}")  # a damaged record is made anew, and its pictures too
    record(one())
    assert RecordedRun.open(folder).count == 12


def test_a_checkpoint_that_was_scored_anew_on_fewer_pictures_is_drawn_again(
    copied: Callable[[str], Path], one: Make, thrice: Callable[[], None]
) -> None:
    folder = copied("textual-inversion")
    rescore(folder, [3, 7])
    thrice()
    record(one())
    few = RescoredRun.open(folder)
    assert few is not None
    assert few.count == 4
    shelf = RecordingArchive.open(folder.parents[2])
    assert _missing(shelf, next(iter(shelf)), {3}) == [3]
    rescore(folder, [3])
    found = RescoredRun.open(folder)
    assert found is not None
    assert (found.steps.tolist(), found.count) == ([3], 12)
    for which, values in found.pictures.items():  # on the same seeds and others
        # In other batches a pixel may round otherwise (1e-5 of a cosine on some CPUs); other seeds are 1e-2 apart.
        np.testing.assert_allclose(values[0, :4], few.pictures[which][0], atol=2e-4)


def test_a_run_that_an_experiment_needs_is_found_among_the_records(
    copied: Callable[[str], Path], one: Make, tmp_path: Path
) -> None:
    folder = copied("textual-inversion")
    bench = ExtraRuns(tmp_path, quick=False, records=Path(one().records))
    planned = replace(one(), records=str(tmp_path / "own"))
    assert bench.found(planned) == one()
    for other in (replace(planned, seed=1), replace(planned, settings=(*planned.settings, ("adam_beta1", 0.8)))):
        assert bench.found(other) == other
    (folder / "scores.json").write_text("{}")
    assert bench.found(planned) == planned
    assert ExtraRuns(tmp_path, quick=False).found(planned) == planned


@pytest.mark.slow
def test_checkpoints_of_several_runs_are_scored_anew_side_by_side(copied: Callable[[str], Path]) -> None:
    folders = [copied(method) for method in METHODS[:2]]
    shelf, told = RecordingArchive.open(folders[0].parents[2]), list[str]()
    broken = next(record for record in shelf if record.method == METHODS[1])
    for path in folders[1].glob("checkpoint-*"):
        shutil.rmtree(path)
    wanted = {record: {0, 5} for record in shelf}
    found = with_rescored(shelf, wanted, told.append)
    assert told[0].startswith("4 checkpoints of 2 runs to draw anew, about ")
    assert any(line.startswith(f"{broken.name}: ") and "no checkpoint before step 5" in line for line in told)
    assert {name: anew.steps.tolist() for name, anew in found.rescored.items()} == {
        "textual-inversion/ball/0": [0, 5],
        broken.name: [0],
    }
    whole = {record: steps for record, steps in wanted.items() if record is not broken}
    assert with_rescored(found, whole, told.append) is found  # nothing is missing
    assert RecordingArchive.open(folders[0].parents[2]).rescored.keys() == found.rescored.keys()


def test_input_that_cannot_be_recorded_is_refused_before_training(
    one: Make, concepts: Path, clip: Path, tmp_path: Path
) -> None:
    def refused(match: str, kind: type[Exception] = RefusedInput, **changed: Any) -> None:
        with pytest.raises(kind, match=match):
            record(replace(one(), **changed))

    lonely = tmp_path / "lonely"
    shutil.copytree(concepts, lonely)
    for path in sorted((lonely / "ball").glob("*.png"))[1:]:
        path.unlink()
    refused("one picture, and a concept that is scored needs two", concepts=str(lonely))
    (lonely / "ball" / "concept.json").write_text("{}")
    refused("must hold", concepts=str(lonely))
    refused("holds no concepts", concepts=str(tmp_path))
    refused("no concept 'bal', the nearest is ball", concept="bal")
    refused("method must be one of", method="hypernetwork")
    refused("preset must be one of quick, cpu, full", plan="huge")
    refused("needs a constant learning rate", settings=(*one().settings, ("lr_scheduler", "cosine")))
    refused("does not load as a CLIP", ModelError, clip=str(tmp_path / "nowhere"))
    small = tiny_clip(tmp_path / "small")
    processor = json.loads((small / "preprocessor_config.json").read_text())
    processor["crop_size"] = {"height": 24, "width": 24}
    (small / "preprocessor_config.json").write_text(json.dumps(processor))
    refused("its processor makes 24x24, it reads 32", ModelError, clip=str(small))
    assert not list((tmp_path / "r").rglob("trace.jsonl"))


def test_log_spaced_steps_begin_at_0_end_at_the_cap_and_grow_by_equal_ratios() -> None:
    steps = log_spaced(6100, 40)
    assert (steps[0], steps[-1], len(steps)) == (0, 6100, 40)
    ratios = [later / earlier for earlier, later in pairwise(steps[10:])]
    assert max(ratios) / min(ratios) < 1.05
    assert all(step % 5 == 0 for step in log_spaced(1500, 40, 5))
    assert log_spaced(3, 40) == [0, 3]


def test_the_two_halves_of_the_pictures_share_their_prompts_and_no_seed() -> None:
    drawn = ScoringPrompts.of(["a <thing>", "my <thing>"], "<thing>", "mug", 4, ["beach", "snow"])
    assert drawn.prompts[::2] == drawn.prompts[1::2]
    assert len(set(drawn.seeds)) == len(drawn.prompts) == 8
    assert drawn.texts[:5] == ("a mug",) * 4 + ("my mug",)
    assert drawn.places == ("beach",) * 4 + ("snow",) * 4


def test_validation_places_are_said_as_the_bundled_world_says_them() -> None:
    from dvar.mini.world.places import PLACES as ALL

    assert {name: ALL[name].words for name in PLACES} == PLACES


def test_a_sheet_gives_its_pictures_back(tmp_path: Path) -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    rows = [[Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(3)] for _ in range(2)]
    write_sheet(tmp_path / "sheet.png", rows)
    for given, read in zip(rows, read_sheet(tmp_path / "sheet.png"), strict=True):
        assert [picture.tobytes() for picture in given] == [picture.tobytes() for picture in read]


def test_a_run_that_breaks_is_no_record(one: Make) -> None:
    from dvar.errors import NonFiniteLoss

    recording = one(settings={"learning_rate": 1e30})
    with pytest.raises(NonFiniteLoss):
        record(recording)
    assert not (recording.folder / "done.json").exists()


# Reading and running


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_reading_a_record_is_running(method: str, finished: Callable[[str], Path]) -> None:
    """Two rules that stop on the way, and one that never does: the true run ends where it was read, bit for bit."""
    found = RecordedRun.open(finished(method))
    for rule in (FixedSteps(5), Plateau("eval", 8, 1e9), Dvar(8, 1e-9)):
        one = agreement(found, Strategy("way", rule))
        assert one.ran == one.read.stop
        assert one.equal, one.differing
        assert one.seconds > 0
        assert one.spread[0] <= one.expected <= one.spread[1]
    assert torch.get_num_threads() == 1
