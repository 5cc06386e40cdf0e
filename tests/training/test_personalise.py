"""Complete runs on the tiny model: files, resuming, signals, exports."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import dvar.training.personalise
import dvar.training.run
from dvar.config.methods import TextualInversionConfig
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.diffusion.clip import Clip
from dvar.diffusion.objective import denoising_loss
from dvar.diffusion.sampling import sample, sample_into
from dvar.errors import CheckpointError, NonFiniteLoss, RefusedInput
from dvar.locks import lock_folder
from dvar.runs.load_model import load_personalised_backbone
from dvar.stopping.diagnosis import Reason
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.testing import tiny_clip, tiny_pipeline
from dvar.training.augmentation import encode_examples
from dvar.training.checkpoint import Checkpoint, latest_checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise
from dvar.training.preflight import preflight

CAP = 12


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TextualInversionConfig:
    return TextualInversionConfig(
        pretrained_model_name_or_path=str(tiny_model),
        instance_data_dir=str(tiny_images),
        initializer_token="mug",
        resolution=32,
        max_train_steps=CAP,
        window=8,
        threshold=1e-9,
        validation_steps=5,
        num_validation_images=2,
        num_inference_steps=2,
        checkpointing_steps=4,
        output_dir=str(tmp_path / "run"),
    )


def load_vectors(folder: Path) -> torch.Tensor:
    vectors: torch.Tensor = load_file(folder / "learned_embeds.safetensors")["<thing>"]
    return vectors


def load_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of a run without their seconds."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_run_writes_its_files(config: TextualInversionConfig) -> None:
    steps: list[StepRecord] = []
    result = personalise(config, [steps.append])
    folder = result.folder
    assert [step.step for step in steps] == list(range(CAP + 1))
    assert result.verdict.reason is Reason.CAP
    assert {entry.name for entry in folder.iterdir()} == {
        *("config.json", "trace.jsonl", "result.json", "README.md", "learned_embeds.safetensors"),
        *("references", "samples"),
        *(f"checkpoint-{step}" for step in (0, 4, 8, 12)),
        *(f"learned_embeds-steps-{result.best_step}.safetensors" for _ in range(result.best_step != CAP)),
    }
    settings = json.loads((folder / "config.json").read_text())
    assert {name: settings[name] for name in asdict(config)} == asdict(config)
    assert {"dvar", "torch", "diffusers", "transformers"} <= settings["versions"].keys()
    facts = json.loads((folder / "result.json").read_text())
    assert Verdict.from_json(facts["verdict"]) == result.verdict
    assert (facts["steps"], facts["exported_step"], facts["stopped"]) == (CAP, CAP, False)
    assert facts["placeholder"] == "<thing>"
    assert facts["seconds"].keys() == {"train", "probe", "other"}
    assert facts["best_step"] == int(np.argmin(Trace.read(folder / "trace.jsonl").values))
    assert len(Trace.read(folder / "trace.jsonl").header["timesteps"]) == 8
    for step in ("000000", "000005", "000010", "000012"):
        assert [path.name for path in sorted((folder / "samples" / f"step-{step}").iterdir())] == ["00.png", "01.png"]
    assert json.loads((folder / "samples" / "prompts.json").read_text()) == [
        {"prompt": "a photo of <thing>", "seed": 0},
        {"prompt": "a photo of <thing>", "seed": 1},
    ]
    references = [Image.open(path).copy() for path in sorted((folder / "references").iterdir())]
    assert [image.size for image in references] == [(32, 32)] * 4


@pytest.mark.parametrize("allow", [False, True])
def test_float32_is_computed_as_float32_unless_asked_for_otherwise(
    config: TextualInversionConfig, allow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allow)
    inside: set[bool] = set()
    settings = replace(config, allow_tf32=allow, max_train_steps=9, num_validation_images=1)
    folder = personalise(settings, [lambda step: inside.add(torch.backends.cudnn.allow_tf32)]).folder
    assert inside == {allow}
    assert torch.backends.cudnn.allow_tf32 is not allow
    assert json.loads((folder / "config.json").read_text())["allow_tf32"] is allow
    arithmetic = json.loads((folder / "result.json").read_text())["arithmetic"]
    assert arithmetic == {"device": "cpu", "threads": torch.get_num_threads(), "mixed_precision": "no", "tf32": False}


@pytest.mark.parametrize("seed", [0, 3])
def test_the_held_timesteps_can_be_one_of_each_part_of_the_schedule(config: TextualInversionConfig, seed: int) -> None:
    def held(**changes: Any) -> list[int]:
        personalise(replace(config, max_train_steps=9, window=8, seed=seed, overwrite=True, **changes))
        timesteps: list[int] = Trace.read(Path(config.output_dir) / "trace.jsonl").header["timesteps"]
        return timesteps

    spread = held(eval_timesteps="stratified")
    assert [timestep * 8 // 1000 for timestep in spread] == list(range(8))
    assert held(eval_timesteps="stratified") == spread
    assert [timestep * 8 // 1000 for timestep in held()] != list(range(8))


def test_a_held_batch_of_large_images_is_evaluated_in_parts(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Trace.read(personalise(config).folder / "trace.jsonl")
    sizes: list[int] = []
    loss = denoising_loss

    def note_size(predict: Any, draws: Any, schedule: Any) -> torch.Tensor:
        sizes.append(len(draws.timesteps))
        return loss(predict, draws, schedule)

    monkeypatch.setattr("dvar.training.run.denoising_loss", note_size)
    monkeypatch.setattr("dvar.training.run.HELD_PIXELS", 3 * 32 * 32)
    parts = Trace.read(personalise(replace(config, overwrite=True)).folder / "trace.jsonl")
    assert sizes[:3] == [3, 3, 2]
    np.testing.assert_allclose(parts.samples, whole.samples, rtol=1e-4)


def test_training_lowers_the_loss_on_the_fixed_batch(config: TextualInversionConfig) -> None:
    personalise(replace(config, max_train_steps=40, validation_steps=100))
    values = Trace.read(Path(config.output_dir) / "trace.jsonl").values
    assert values[-1] < values[0] - 3 * np.abs(np.diff(values[-10:])).mean()


def test_the_rule_stops_a_run(config: TextualInversionConfig) -> None:
    result = personalise(replace(config, threshold=0.999, max_train_steps=100))
    assert result.verdict.reason is Reason.STABILISED
    assert result.steps < 100
    assert json.loads((result.folder / "result.json").read_text())["stopped"] is True
    assert load_records(result.folder)[-1]["step"] == result.steps == latest_checkpoint(result.folder).step


def test_runs_of_one_seed_are_equal_and_of_two_seeds_differ(config: TextualInversionConfig, tmp_path: Path) -> None:
    first, repeat, reseeded = (replace(config, output_dir=str(tmp_path / name)) for name in ("one", "again", "other"))
    personalise(first)
    torch.manual_seed(123)
    personalise(repeat)
    personalise(replace(reseeded, seed=1))
    folders = [Path(settings.output_dir) for settings in (first, repeat, reseeded)]
    assert torch.equal(load_vectors(folders[0]), load_vectors(folders[1]))
    assert load_records(folders[0]) == load_records(folders[1])
    for image in sorted((folders[0] / "samples").rglob("*.png")):
        assert image.read_bytes() == (folders[1] / image.relative_to(folders[0])).read_bytes()
    assert not torch.equal(load_vectors(folders[0]), load_vectors(folders[2]))


def test_the_probe_does_not_affect_training(config: TextualInversionConfig, tmp_path: Path) -> None:
    frequent = replace(config, output_dir=str(tmp_path / "often"), probe_every=1, window=40, max_train_steps=45)
    rare = replace(frequent, output_dir=str(tmp_path / "seldom"), probe_every=5)
    states = []
    for settings in (frequent, rare):
        torch.manual_seed(0)
        personalise(replace(settings, validation_steps=100, num_validation_images=1))
        states.append(torch.get_rng_state())
    records = [load_records(Path(settings.output_dir)) for settings in (frequent, rare)]
    assert torch.equal(load_vectors(Path(frequent.output_dir)), load_vectors(Path(rare.output_dir)))
    assert torch.equal(*states)
    assert [row.get("train_loss") for row in records[0]] == [row.get("train_loss") for row in records[1]]
    for often_row, seldom_row in zip(*records, strict=True):
        assert ("eval" in seldom_row) == (seldom_row["step"] % 5 == 0)
        assert seldom_row.get("eval", often_row["eval"]) == often_row["eval"]


class Killed(BaseException):
    """The process ends here: nothing after it is carried out."""


def kill_at(number: int) -> Callable[[StepRecord], None]:
    def kill(record: StepRecord) -> None:
        if record.step == number:
            raise Killed

    return kill


STEPS = [pytest.param(step, marks=() if step in (0, 3, 4, 11) else pytest.mark.slow) for step in range(CAP + 1)]


@pytest.fixture(scope="module")
def reference_run(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the settings of `config`."""
    folder = tmp_path_factory.mktemp("reference")
    settings = config.__wrapped__(tiny_model, tiny_images, folder)  # type: ignore[attr-defined]
    return personalise(settings).folder


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_any_step_resumes_bit_for_bit(
    config: TextualInversionConfig, reference_run: Path, step: int
) -> None:
    with pytest.raises(Killed):
        personalise(config, [kill_at(step)])
    folder = Path(config.output_dir)
    saved_step = latest_checkpoint(folder).step
    assert saved_step == step // 4 * 4
    lines = (folder / "trace.jsonl").read_bytes().splitlines()
    assert not (folder / "result.json").exists()
    result = personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(load_vectors(folder), load_vectors(reference_run))
    assert load_records(folder) == load_records(reference_run)
    assert result.best_step == json.loads((reference_run / "result.json").read_text())["best_step"]
    for image in sorted((reference_run / "samples").rglob("*.png")):
        assert image.read_bytes() == (folder / image.relative_to(reference_run)).read_bytes()
    discarded = folder / f"trace.jsonl.cut-{saved_step}"
    assert (discarded.read_bytes().splitlines() if discarded.exists() else []) == lines[saved_step + 2 :]
    for line in lines[saved_step + 2 :]:
        repeated = json.loads(line)
        repeated.pop("seconds")
        assert repeated == load_records(folder)[repeated["step"]]


@pytest.mark.parametrize(("optimizer", "rate"), [("sam", 0.5), ("prodigy", 1.0)])
def test_a_killed_run_of_another_optimizer_resumes_bit_for_bit(
    config: TextualInversionConfig, tmp_path: Path, optimizer: str, rate: float
) -> None:
    pytest.importorskip("prodigyopt")
    settings = replace(config, optimizer=optimizer, learning_rate=rate, gradient_accumulation_steps=2)  # type: ignore[arg-type]
    reference = personalise(replace(settings, output_dir=str(tmp_path / "reference"))).folder
    with pytest.raises(Killed):
        personalise(settings, [kill_at(6)])
    resumed = personalise(replace(settings, resume_from_checkpoint="latest")).folder
    assert torch.equal(load_vectors(resumed), load_vectors(reference))
    assert load_records(resumed) == load_records(reference)
    assert not torch.equal(load_vectors(reference), Checkpoint.read(reference / "checkpoint-0").state["<thing>"])


def test_a_run_resumes_from_a_named_checkpoint(config: TextualInversionConfig, reference_run: Path) -> None:
    personalise(config)
    personalise(replace(config, resume_from_checkpoint="checkpoint-4"))
    folder = Path(config.output_dir)
    assert torch.equal(load_vectors(folder), load_vectors(reference_run))
    assert load_records(folder) == load_records(reference_run)


def test_a_damaged_checkpoint_is_skipped(config: TextualInversionConfig, reference_run: Path) -> None:
    with pytest.raises(Killed):
        personalise(config, [kill_at(9)])
    folder = Path(config.output_dir)
    (folder / "checkpoint-8" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="checkpoint-8 is damaged"):
        personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(load_vectors(folder), load_vectors(reference_run))
    assert load_records(folder) == load_records(reference_run)


def test_a_run_stopped_by_the_cap_resumes_under_a_higher_cap(
    config: TextualInversionConfig, reference_run: Path
) -> None:
    shorter = replace(config, max_train_steps=9)
    folder = personalise(shorter).folder
    assert (folder / "result.json").exists()
    unfinished: list[bool] = []
    resumed = replace(config, resume_from_checkpoint="latest", extend=True)
    personalise(resumed, [lambda step: unfinished.append(not (folder / "result.json").exists())])
    assert unfinished == [True] * 3
    assert torch.equal(load_vectors(folder), load_vectors(reference_run))
    assert load_records(folder) == load_records(reference_run)
    assert json.loads((folder / "result.json").read_text())["steps"] == CAP


def test_resuming_a_finished_run_changes_nothing(config: TextualInversionConfig) -> None:
    result = personalise(config)
    before = load_vectors(result.folder)
    steps: list[StepRecord] = []
    resumed = personalise(replace(config, resume_from_checkpoint="latest"), [steps.append])
    assert steps == []
    assert (resumed.verdict, resumed.steps, resumed.best_step) == (result.verdict, result.steps, result.best_step)
    assert torch.equal(load_vectors(result.folder), before)


def test_other_repeats_are_another_run(config: TextualInversionConfig, tmp_path: Path) -> None:
    images = shutil.copytree(str(config.instance_data_dir), tmp_path / "own")
    settings = replace(config, instance_data_dir=str(images))
    personalise(settings)
    first = sorted(path.name for path in images.glob("*.png"))[0]
    (images / "metadata.jsonl").write_text(json.dumps({"file_name": first, "repeats": 5}))
    with pytest.raises(CheckpointError, match="or how often each is drawn changed"):
        personalise(replace(settings, resume_from_checkpoint="latest"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate was 0.01 and is 0.5"),
        ({"seed": 3, "window": 9}, "seed was 0 and is 3; window was 8 and is 9"),
        ({"lr_scheduler": "linear", "max_train_steps": 20, "extend": True}, "max_train_steps was 12 and is 20"),
        (
            {"max_train_steps": 20},
            "max_train_steps was 12 and is 20): resume with those (a higher cap alone is accepted",
        ),
        ({"max_train_steps": 10, "extend": True}, "max_train_steps was 12 and is 10): resume with those, or start"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(
    config: TextualInversionConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(Killed):
        personalise(config, [kill_at(5)])
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        personalise(replace(config, resume_from_checkpoint="latest", **change))
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


def test_a_setting_missing_from_a_checkpoint_has_its_default(
    config: TextualInversionConfig, reference_run: Path
) -> None:
    with pytest.raises(Killed):
        personalise(config, [kill_at(5)])
    checkpoint = latest_checkpoint(Path(config.output_dir))
    settings = {name: value for name, value in checkpoint.facts["config"].items() if name != "attention_slicing"}
    replace(checkpoint, facts={**checkpoint.facts, "config": settings}).write(Path(config.output_dir))
    with pytest.raises(CheckpointError, match="attention_slicing was False and is True"):
        personalise(replace(config, resume_from_checkpoint="latest", attention_slicing=True))
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(load_vectors(Path(config.output_dir)), load_vectors(reference_run))


def test_a_checkpoint_of_other_images_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    from dvar.testing import tiny_concept

    with pytest.raises(Killed):
        personalise(config, [kill_at(5)])
    other_images = tiny_concept(tmp_path / "other", size=80)
    with pytest.raises(CheckpointError, match="the images, their captions or how often each is drawn changed"):
        personalise(replace(config, resume_from_checkpoint="latest", instance_data_dir=str(other_images)))


def test_a_checkpoint_on_another_base_model_is_refused(
    config: TextualInversionConfig, tmp_path: Path, tiny_model: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = replace(config, pretrained_model_name_or_path=str(model))
    with pytest.raises(Killed):
        personalise(settings, [kill_at(5)])
    shutil.rmtree(model)
    tiny_pipeline(model, seed=1)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"made on another base model \(its SHA-256 was \w{12}\.\.\. and is"):
        personalise(replace(settings, resume_from_checkpoint="latest"))
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


def test_a_run_stopped_by_its_rule_takes_no_further_step(config: TextualInversionConfig) -> None:
    settings = replace(config, threshold=0.999, max_train_steps=100)
    result = personalise(settings)
    steps: list[StepRecord] = []
    again = replace(settings, resume_from_checkpoint="latest")
    longer = replace(again, extend=True, max_train_steps=200)
    ended = f"the rule had ended this run at step {result.steps}, and --extend raises the cap alone: train into another"
    for resumed, warned in ((again, nullcontext()), (longer, pytest.warns(UserWarning, match=ended))):
        with warned:
            outcome = personalise(resumed, [steps.append])
        assert (outcome.steps, outcome.verdict.reason) == (result.steps, Reason.STABILISED)
    assert steps == []


@pytest.mark.parametrize(("keep", "exported", "extra_files"), [("last", CAP, 0), ("best", 5, 0), ("last,best", CAP, 1)])
def test_the_exported_steps_follow_the_keep_setting(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch, keep: Any, exported: int, extra_files: int
) -> None:
    original, calls = denoising_loss, iter(range(10**6))
    monkeypatch.setattr(
        dvar.training.run, "denoising_loss", lambda *arguments: original(*arguments) + (next(calls) >= 12)
    )
    folder = personalise(replace(config, keep=keep, checkpointing_steps=1)).folder
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["exported_step"], facts["best_step"], facts["best_by"]) == (exported, 5, "l_det")
    assert torch.equal(load_vectors(folder), Checkpoint.read(folder / f"checkpoint-{exported}").state["<thing>"])
    assert len(list(folder.glob("learned_embeds-steps-5.safetensors"))) == extra_files
    assert set(facts["weights"]) | set(facts["best_weights"]) == {path.name for path in folder.glob("*.safetensors")}


def test_overwriting_replaces_only_the_files_of_a_run(config: TextualInversionConfig) -> None:
    folder = personalise(config).folder
    (folder / "notes.txt").write_text("mine")
    (folder / "report.html").write_text("of the old run")
    before = load_vectors(folder)
    with pytest.raises(RefusedInput, match="overwrite"):
        personalise(replace(config, seed=1))
    with pytest.raises(RefusedInput, match="initializer_token"):
        personalise(replace(config, seed=1, overwrite=True, initializer_token="unheard-of"))
    assert torch.equal(load_vectors(folder), before)
    personalise(replace(config, seed=1, overwrite=True, max_train_steps=10))
    assert not torch.equal(load_vectors(folder), before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "report.html").exists()
    assert not (folder / "checkpoint-12").exists()


def test_all_problems_are_reported_before_a_model_loads(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    invalid_config = replace(config, instance_data_dir="nowhere", placeholder_token="mug", window=50)
    with pytest.raises(RefusedInput) as error:
        personalise(invalid_config)
    assert len(error.value.problems) == 3
    assert not Path(config.output_dir).exists()


def test_under_nohup_a_closed_terminal_ends_nothing(config: TextualInversionConfig) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = personalise(config, [lambda step: os.kill(os.getpid(), signal.SIGHUP)])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result.verdict.reason is Reason.CAP


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_run_after_its_step_and_it_resumes_bit_for_bit(
    config: TextualInversionConfig, reference_run: Path, number: signal.Signals
) -> None:
    usual = signal.signal(number, signal.default_int_handler)  # under nohup, SIGHUP would be ignored
    try:
        handler = signal.getsignal(number)

        def send(step: StepRecord) -> None:
            if step.step == 6:
                os.kill(os.getpid(), number)

        result = personalise(config, [send])
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, usual)
    assert result.verdict.reason is Reason.INTERRUPTED
    assert result.steps == 7
    assert latest_checkpoint(result.folder).step == 7
    assert not (result.folder / "result.json").exists()
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(load_vectors(result.folder), load_vectors(reference_run))
    assert load_records(result.folder) == load_records(reference_run)


@pytest.mark.parametrize("optimizer", ["adamw", "sam"])
def test_a_signal_within_an_update_abandons_it_and_the_run_resumes_bit_for_bit(
    config: TextualInversionConfig, tmp_path: Path, optimizer: Any
) -> None:
    settings = replace(config, gradient_accumulation_steps=4, optimizer=optimizer)
    reference = personalise(replace(settings, output_dir=str(tmp_path / "reference"))).folder
    original, passes = denoising_loss, iter(range(10**6))
    # An evaluation and an update take turns; this is the second to last pass of update 6, of SAM's second look.
    signal_pass = 1 + 5 * 5 + 2 if optimizer == "adamw" else 1 + 5 * 9 + 6

    def loss(*arguments: Any) -> torch.Tensor:
        if next(passes) == signal_pass:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvar.training.run, "denoising_loss", loss)
        result = personalise(settings)
    assert next(passes) == signal_pass + 1, "no pass came after it"
    assert result.verdict.reason is Reason.INTERRUPTED
    assert (
        result.steps
        == result.verdict.step
        == latest_checkpoint(result.folder).step
        == load_records(result.folder)[-1]["step"]
        == 5
    )
    personalise(replace(settings, resume_from_checkpoint="latest"))
    assert torch.equal(load_vectors(result.folder), load_vectors(reference))
    assert load_records(result.folder) == load_records(reference)


def signal_during_sampling(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Send SIGTERM in call `number` of `sample_into`, call 0 being that of the untouched model; return the calls."""
    original, calls = sample_into, list[int]()

    def sample_or_signal(folder: Path, *arguments: Any, interrupted: Callable[[], bool], **options: Any) -> list[Path]:
        calls.append(len(calls))
        if calls[-1] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(folder, *arguments, interrupted=interrupted, **options)

    monkeypatch.setattr(dvar.training.run, "sample_into", sample_or_signal)
    return calls


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_ends_sampling_and_the_resumed_run_generates_the_same_images(
    config: TextualInversionConfig, reference_run: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        calls = signal_during_sampling(patch, number)
        result = personalise(config)
    assert len(calls) == number + 1
    assert result.verdict.reason is Reason.INTERRUPTED
    assert result.steps == result.verdict.step == latest_checkpoint(result.folder).step == 5 * number
    assert not (result.folder / "samples" / f"step-{5 * number:06d}").exists()
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert load_records(result.folder) == load_records(reference_run)
    for image in sorted((reference_run / "samples").rglob("*.png")):
        assert image.read_bytes() == (result.folder / image.relative_to(reference_run)).read_bytes()


# Calls are those that are scored, at 0, 5, 10 and the cap of 12, each followed by the one for the samples of its step.
@pytest.mark.parametrize(
    ("number", "step"),
    [pytest.param(0, 0, marks=pytest.mark.slow), (2, 5), pytest.param(6, 12, marks=pytest.mark.slow)],
)
def test_a_signal_while_sampling_for_scores_loses_neither_score_nor_best_step(
    config: TextualInversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    settings = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")))
    reference_run = personalise(replace(settings, output_dir=str(tmp_path / "reference")))
    with monkeypatch.context() as patch:
        signal_during_sampling(patch, number)
        result = personalise(settings)
    assert result.verdict.reason is Reason.INTERRUPTED
    assert latest_checkpoint(result.folder).step == step
    assert "clip_image" not in load_records(result.folder)[-1]
    resumed = personalise(replace(settings, resume_from_checkpoint="latest"))
    assert load_records(resumed.folder) == load_records(reference_run.folder)
    assert resumed.best_step == reference_run.best_step
    assert torch.equal(load_vectors(resumed.folder), load_vectors(reference_run.folder))


def test_a_signal_at_the_last_step_leaves_the_export_to_the_resumed_run(
    config: TextualInversionConfig, reference_run: Path
) -> None:
    def send(step: StepRecord) -> None:
        if step.step == CAP - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    result = personalise(config, [send])
    assert (result.verdict.reason, result.steps) == (Reason.INTERRUPTED, CAP)
    assert not (result.folder / "result.json").exists()
    assert personalise(replace(config, resume_from_checkpoint="latest")).verdict.reason is Reason.CAP
    assert torch.equal(load_vectors(result.folder), load_vectors(reference_run))


def test_a_second_signal_ends_at_once(config: TextualInversionConfig) -> None:
    def send(step: StepRecord) -> None:
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        personalise(config, [send])
    assert latest_checkpoint(Path(config.output_dir)).step == 0


def corrupt_losses(monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
    """Make the losses nan at these calls of the objective, and add 1 to them from the eighth call on."""
    original, count = denoising_loss, iter(range(10**6))

    def loss(*arguments: Any) -> torch.Tensor:
        call = next(count)
        return original(*arguments) + (float("nan") if call in calls else call >= 8)

    monkeypatch.setattr(dvar.training.run, "denoising_loss", loss)


# Call 0 evaluates the untouched model; then come an update and its evaluation in turn: 13 is update 7, 14 follows it.
@pytest.mark.parametrize("call", [13, 14])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_best_is_exported(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    corrupt_losses(monkeypatch, range(call, call + 1))
    result = personalise(replace(config, checkpointing_steps=1))
    folder = result.folder
    assert result.verdict.reason is Reason.NON_FINITE
    assert (result.steps, result.best_step) == (7, 3)
    assert latest_checkpoint(folder).step == 6
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["exported_step"], facts["stopped"]) == (3, False)
    best = Checkpoint.read(folder / "checkpoint-3").tensors["method/<thing>"]
    assert torch.equal(load_vectors(folder), best)
    assert not list(folder.glob("learned_embeds-steps-*"))
    assert not torch.equal(best, latest_checkpoint(folder).tensors["method/<thing>"])


def test_nothing_is_exported_without_a_finite_loss(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupt_losses(monkeypatch, range(10**6))
    with pytest.raises(NonFiniteLoss, match="nothing is exported"):
        personalise(config)
    assert not list(Path(config.output_dir).glob("learned_embeds*"))
    assert not (Path(config.output_dir) / "result.json").exists()


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_diffusers_loads_the_placeholder_token_and_generates_the_same_image(
    config: TextualInversionConfig, tiny_model: Path, vectors: int
) -> None:
    folder = personalise(replace(config, num_vectors=vectors, learning_rate=0.5)).folder
    with safe_open(folder / "learned_embeds.safetensors", "pt") as file:
        assert list(file.keys()) == ["<thing>"]
        assert file.get_tensor("<thing>").shape == (vectors, 32)
        assert file.get_tensor("<thing>").dtype == torch.float32

    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)

    def generate_image(prompt: str) -> np.ndarray[Any, Any]:
        seed = torch.Generator().manual_seed(5)
        return np.asarray(stock(prompt, generator=[seed], height=32, width=32, num_inference_steps=2).images[0])

    before = generate_image("a photo of <thing> on the beach")
    initial = generate_image("a photo of mug on the beach")
    stock.load_textual_inversion(folder)
    actual = generate_image("a photo of <thing> on the beach")
    assert not np.array_equal(actual, before)
    assert not np.array_equal(actual, initial)
    backbone = load_personalised_backbone(folder, device="cpu")
    expected = sample(backbone, ["a photo of <thing> on the beach"], [5], size=32, steps=2)
    assert np.array_equal(np.asarray(expected[0]), actual)
    assert np.array_equal(generate_image("a photo of mug on the beach"), initial)


def test_sample_images_are_those_of_the_exported_vectors(config: TextualInversionConfig, tiny_model: Path) -> None:
    folder = personalise(replace(config, num_vectors=2)).folder
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_textual_inversion(folder)
    entries = json.loads((folder / "samples" / "prompts.json").read_text())
    seeds = [torch.Generator().manual_seed(entry["seed"]) for entry in entries]
    prompts = [entry["prompt"] for entry in entries]
    expected_images = stock(prompts, generator=seeds, height=32, width=32, num_inference_steps=2).images
    for index, expected_image in enumerate(expected_images):
        image = Image.open(folder / "samples" / f"step-{CAP:06d}" / f"{index:02d}.png")
        assert np.array_equal(np.asarray(image), np.asarray(expected_image))


def test_the_best_step_is_exported_beside_the_last(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = denoising_loss, iter(range(10**6))
    # The evaluations are calls 0, 2, 4, ...; from step 6 on they are 1 higher.
    monkeypatch.setattr(
        dvar.training.run, "denoising_loss", lambda *arguments: original(*arguments) + (next(calls) >= 12)
    )
    vectors: dict[int, torch.Tensor] = {}
    result = personalise(replace(config, checkpointing_steps=1))
    for step in range(CAP + 1):
        vectors[step] = Checkpoint.read(result.folder / f"checkpoint-{step}").tensors["method/<thing>"]
    assert result.best_step == 5
    best = load_file(result.folder / "learned_embeds-steps-5.safetensors")["<thing>"]
    assert torch.equal(best, vectors[5])
    assert torch.equal(load_vectors(result.folder), vectors[CAP])


def test_images_are_mirrored_by_default(config: TextualInversionConfig, tmp_path: Path) -> None:
    shapes = []
    encode = encode_examples

    def spy(*arguments: Any, **options: Any) -> Any:
        examples: Any = encode(*arguments, **options)
        shapes.append(examples.moments.shape)
        return examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvar.training.run, "encode_examples", spy)
        for name, flip in (("flipped", True), ("plain", False)):
            personalise(replace(config, output_dir=str(tmp_path / name), random_flip=flip, max_train_steps=9))
    assert [tuple(shape) for shape in shapes] == [(4, 2, 8, 8, 8), (4, 1, 8, 8, 8)]


def test_an_image_with_a_caption_is_trained_on_that_caption(config: TextualInversionConfig, tmp_path: Path) -> None:
    from dvar.testing import tiny_concept

    images = tiny_concept(tmp_path / "captioned", images=2)
    (images / "00.txt").write_text("a red <thing> on grass")
    texts: list[list[str]] = []
    tokenize = StableDiffusion.tokenize

    def record_prompts(self: StableDiffusion, prompts: list[str]) -> torch.Tensor:
        texts.append(list(prompts))
        return tokenize(self, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "tokenize", record_prompts)
        personalise(replace(config, instance_data_dir=str(images), num_vectors=2))
    assert texts[0] == ["a red <thing> <thing>_1 on grass"]
    assert len(texts[1]) > 10
    assert all("<thing> <thing>_1" in text for text in texts[1])


@pytest.mark.filterwarnings("ignore:fp16 on a CPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_vectors(config: TextualInversionConfig, precision: Any) -> None:
    settings = replace(config, mixed_precision=precision, gradient_checkpointing=True, gradient_accumulation_steps=2)
    result = personalise(settings)
    assert load_vectors(result.folder).dtype == torch.float32
    values = Trace.read(result.folder / "trace.jsonl").values
    # float32 sums: half precision would leave a handful of distinct values, if any.
    assert len(set(values.tolist())) > CAP // 2
    with pytest.raises(Killed):
        personalise(replace(settings, overwrite=True), [kill_at(6)])
    personalise(replace(settings, resume_from_checkpoint="latest"))
    assert np.array_equal(Trace.read(result.folder / "trace.jsonl").values, values)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler of PyTorch warns of what it does itself
def test_a_compiled_run_equals_an_uncompiled_run(config: TextualInversionConfig, reference_run: Path) -> None:
    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:  # "eager": all of it but the machine's own compiler
        patch.setattr(torch, "compile", lambda call, **options: compile(call, **{**options, "backend": "eager"}))
        folder = personalise(replace(config, compile=True)).folder
    torch.testing.assert_close(load_vectors(folder), load_vectors(reference_run), rtol=1e-4, atol=1e-5)


def test_the_model_card_contains_no_paths_and_its_code_runs(config: TextualInversionConfig, tiny_model: Path) -> None:
    folder = personalise(config).folder
    card = (folder / "README.md").read_text()
    assert str(tiny_model.parent) not in card
    assert "`<thing>`" in card
    assert json.loads((folder / "result.json").read_text())["verdict"]["sentence"] in card
    for image in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (folder / image).exists()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    subprocess.run([sys.executable, "-c", code[1].replace(tiny_model.name, str(tiny_model))], cwd=folder, check=True)
    assert (folder / "image.png").exists()


def test_loading_without_a_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no finished run"):
        load_personalised_backbone(tmp_path)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_with_the_same_result(
    config: TextualInversionConfig, reference_run: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    script = (
        "import json, sys\nfrom dvar.config.methods import TextualInversionConfig\n"
        "from dvar.training.personalise import personalise\n"
        "personalise(TextualInversionConfig(**json.loads(open(sys.argv[1]).read())))"
    )
    folder = Path(config.output_dir)
    for attempt in range(60):
        resume = "latest" if (folder / "checkpoint-0").exists() else None
        current = replace(config, checkpointing_steps=1, resume_from_checkpoint=resume, overwrite=resume is None)
        settings.write_text(json.dumps(asdict(current)))
        process = subprocess.Popen([sys.executable, "-c", script, str(settings)])
        deadline = time.monotonic() + 3 + 0.37 * attempt
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        if process.poll() is None:
            process.kill()
            process.wait()
        elif process.returncode == 0:
            break
    assert attempt > 0
    assert torch.equal(load_vectors(folder), load_vectors(reference_run))
    assert load_records(folder) == load_records(reference_run)


def test_the_best_step_by_clip_has_the_samples_nearest_to_the_images(
    config: TextualInversionConfig, tmp_path: Path
) -> None:
    settings = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")), keep="best")
    plain, folder = (
        personalise(replace(config, output_dir=str(tmp_path / "plain"))).folder,
        personalise(settings).folder,
    )
    clip = Clip.load(settings.clip_model or "")
    references = [Image.open(path).copy() for path in sorted((folder / "references").iterdir())]
    scores = {}
    for step in (0, 5, 10, 12):
        samples = [Image.open(path).copy() for path in sorted((folder / "samples" / f"step-{step:06d}").iterdir())]
        scores[step] = float((clip.embed_images(samples) @ clip.embed_images(references).T).mean())
    trace = Trace.read(folder / "trace.jsonl")
    assert dict(zip(*(part.tolist() for part in trace.metric("clip_image")), strict=True)) == pytest.approx(scores)
    best = max((5, 10, 12), key=lambda step: scores[step])  # the untouched model does not count
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["best_step"], facts["exported_step"], facts["best_by"]) == (best, best, "clip")
    # Generating scored images does not affect training: the records equal those of a run without scores.
    assert [{name: row[name] for name in row if name != "clip_image"} for row in load_records(folder)] == load_records(
        plain
    )


def test_a_run_that_fails_before_its_first_clip_score_exports_the_best_step_by_loss(
    config: TextualInversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")), checkpointing_steps=1)
    corrupt_losses(monkeypatch, range(7, 8))  # update 4, before the first score of a trained step, at 5
    result = personalise(settings)
    values = Trace.read(result.folder / "trace.jsonl").values
    facts = json.loads((result.folder / "result.json").read_text())
    assert facts["best_by"] == "l_det"
    assert facts["exported_step"] == facts["best_step"] == int(values.argmin())
    best = Checkpoint.read(result.folder / f"checkpoint-{int(values.argmin())}")
    assert torch.equal(load_vectors(result.folder), best.state["<thing>"])


def test_a_resumed_run_finds_the_same_best_step_by_clip(config: TextualInversionConfig, tmp_path: Path) -> None:
    settings = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")))
    reference_run = personalise(replace(settings, output_dir=str(tmp_path / "reference")))

    def kill(step: StepRecord) -> None:
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalise(settings, [kill])
    resumed = personalise(replace(settings, resume_from_checkpoint="latest"))
    assert load_records(resumed.folder) == load_records(reference_run.folder)
    assert resumed.best_step == reference_run.best_step


@pytest.mark.parametrize(
    "foreign",
    ["samples/mine.png", "logs/notes.md", "checkpoint-500/optimizer.bin", "checkpoint-12/mine.bin", "references/link"],
)
def test_nothing_is_overwritten_beside_what_no_run_wrote(config: TextualInversionConfig, foreign: str) -> None:
    folder = personalise(replace(config, report_to="tensorboard")).folder
    path = folder / foreign
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(folder) if path.name == "link" else path.write_bytes(b"mine")
    before = sorted(folder.rglob("*"))
    with pytest.raises(RefusedInput, match=f"no run wrote {foreign} in "):
        personalise(replace(config, seed=1, overwrite=True))
    assert sorted(folder.rglob("*")) == before
    path.unlink()
    if not any(path.parent.iterdir()):
        path.parent.rmdir()
    personalise(replace(config, seed=1, overwrite=True))
    assert not list(folder.glob("logs/*")), "of the run before"


def test_copies_of_one_s_own_stay(config: TextualInversionConfig) -> None:
    folder = personalise(config).folder
    names = ("learned_embeds-mine.safetensors", "learned_embeds.mine.safetensors", "trace.jsonl.mine")
    copies = [folder / name for name in names]
    for path in copies:
        path.write_bytes(b"mine")
    (folder / "learned_embeds-steps-3.safetensors").write_bytes(b"of an earlier end")
    more = replace(config, max_train_steps=config.max_train_steps + 1, extend=True)
    personalise(replace(more, resume_from_checkpoint="latest"))
    assert [path.read_bytes() for path in copies] == [b"mine"] * 3
    assert not (folder / "learned_embeds-steps-3.safetensors").exists()
    copies[1].unlink()  # which has the name of one of several tokens
    personalise(replace(config, overwrite=True))
    assert [path.exists() for path in copies] == [True, False, True]


def test_a_folder_that_another_run_writes_is_refused_before_a_model_is_loaded(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dvar.training.personalise, "load_backbone", None)
    for ours in (config, replace(config, resume_from_checkpoint="latest"), replace(config, overwrite=True)):
        with lock_folder(Path(config.output_dir)), pytest.raises(RefusedInput, match="is being written by process"):
            personalise(ours)
    assert not Path(config.output_dir).exists()


def test_a_run_that_another_process_made_since_the_check_is_not_removed(config: TextualInversionConfig) -> None:
    concept = preflight(config)
    personalise(replace(config, seed=1))
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(RefusedInput, match="holds another run"):
        personalise(config, concept=concept)
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before
