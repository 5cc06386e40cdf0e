"""Whole runs on the tiny model."""

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

import dvar.training.run
from dvar.config.training import TextualInversionConfig
from dvar.diffusion.clip import Clip
from dvar.diffusion.objective import denoising_loss
from dvar.diffusion.sampling import sample, sample_into
from dvar.diffusion.stable_diffusion import StableDiffusion
from dvar.errors import CheckpointError, NonFiniteLoss, RefusedInput
from dvar.runs.load_model import load_personalised_backbone
from dvar.stopping.diagnosis import Reason
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict
from dvar.testing import tiny_clip, tiny_pipeline
from dvar.training.augmentation import encode_examples
from dvar.training.checkpoint import Checkpoint, latest_checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise

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


def embeds(folder: Path) -> torch.Tensor:
    vectors: torch.Tensor = load_file(folder / "learned_embeds.safetensors")["<thing>"]
    return vectors


def rows(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, every field but the seconds."""
    records = Trace.read(folder / "trace.jsonl").records
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def test_a_run_leaves_what_it_promises(config: TextualInversionConfig) -> None:
    seen: list[StepRecord] = []
    result = personalise(config, [seen.append])
    folder = result.folder
    assert [step.step for step in seen] == list(range(CAP + 1))
    assert result.verdict.reason is Reason.CAP
    assert {entry.name for entry in folder.iterdir()} == {
        *("config.json", "trace.jsonl", "result.json", "README.md", "learned_embeds.safetensors"),
        *("references", "samples"),
        *(f"checkpoint-{step}" for step in (0, 4, 8, 12)),
        *(f"learned_embeds-steps-{result.best_step}.safetensors" for _ in range(result.best_step != CAP)),
    }
    written = json.loads((folder / "config.json").read_text())
    assert {name: written[name] for name in asdict(config)} == asdict(config)
    assert {"dvar", "torch", "diffusers", "transformers"} <= written["versions"].keys()
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
    shown = [Image.open(path).copy() for path in sorted((folder / "references").iterdir())]
    assert [picture.size for picture in shown] == [(32, 32)] * 4


def test_training_lowers_the_loss_on_the_fixed_batch(config: TextualInversionConfig) -> None:
    personalise(replace(config, max_train_steps=40, validation_steps=100))
    values = Trace.read(Path(config.output_dir) / "trace.jsonl").values
    assert values[-1] < values[0] - 3 * np.abs(np.diff(values[-10:])).mean()


def test_the_rule_stops_a_run_by_itself(config: TextualInversionConfig) -> None:
    result = personalise(replace(config, threshold=0.999, max_train_steps=100))
    assert result.verdict.reason is Reason.STABILISED
    assert result.steps < 100
    assert json.loads((result.folder / "result.json").read_text())["stopped"] is True
    assert rows(result.folder)[-1]["step"] == result.steps == latest_checkpoint(result.folder).step


def test_one_seed_gives_one_run_and_another_seed_another(config: TextualInversionConfig, tmp_path: Path) -> None:
    one, again, other = (replace(config, output_dir=str(tmp_path / name)) for name in ("one", "again", "other"))
    personalise(one)
    torch.manual_seed(123)
    personalise(again)
    personalise(replace(other, seed=1))
    folders = [Path(each.output_dir) for each in (one, again, other)]
    assert torch.equal(embeds(folders[0]), embeds(folders[1]))
    assert rows(folders[0]) == rows(folders[1])
    for picture in sorted((folders[0] / "samples").rglob("*.png")):
        assert picture.read_bytes() == (folders[1] / picture.relative_to(folders[0])).read_bytes()
    assert not torch.equal(embeds(folders[0]), embeds(folders[2]))


def test_the_probe_does_not_touch_training(config: TextualInversionConfig, tmp_path: Path) -> None:
    often = replace(config, output_dir=str(tmp_path / "often"), probe_every=1, window=40, max_train_steps=45)
    seldom = replace(often, output_dir=str(tmp_path / "seldom"), probe_every=5)
    states = []
    for each in (often, seldom):
        torch.manual_seed(0)
        personalise(replace(each, validation_steps=100, num_validation_images=1))
        states.append(torch.get_rng_state())
    records = [rows(Path(each.output_dir)) for each in (often, seldom)]
    assert torch.equal(embeds(Path(often.output_dir)), embeds(Path(seldom.output_dir)))
    assert torch.equal(*states)
    assert [row.get("train_loss") for row in records[0]] == [row.get("train_loss") for row in records[1]]
    for often_row, seldom_row in zip(*records, strict=True):
        assert ("eval" in seldom_row) == (seldom_row["step"] % 5 == 0)
        assert seldom_row.get("eval", often_row["eval"]) == often_row["eval"]


class Killed(BaseException):
    """The process dies here: nothing after it is carried out."""


def killed_at(step: int) -> Callable[[StepRecord], None]:
    def kill(seen: StepRecord) -> None:
        if seen.step == step:
            raise Killed

    return kill


STEPS = [pytest.param(step, marks=() if step in (0, 3, 4, 11) else pytest.mark.slow) for step in range(CAP + 1)]


@pytest.fixture(scope="module")
def straight(tiny_model: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the settings of `config`."""
    folder = tmp_path_factory.mktemp("straight")
    settings = config.__wrapped__(tiny_model, tiny_images, folder)  # type: ignore[attr-defined]
    return personalise(settings).folder


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_any_step_goes_on_bit_for_bit(
    config: TextualInversionConfig, straight: Path, step: int
) -> None:
    with pytest.raises(Killed):
        personalise(config, [killed_at(step)])
    folder = Path(config.output_dir)
    saved = latest_checkpoint(folder).step
    assert saved == step // 4 * 4
    lines = (folder / "trace.jsonl").read_bytes().splitlines()
    assert not (folder / "result.json").exists()
    result = personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(embeds(folder), embeds(straight))
    assert rows(folder) == rows(straight)
    assert result.best_step == json.loads((straight / "result.json").read_text())["best_step"]
    for picture in sorted((straight / "samples").rglob("*.png")):
        assert picture.read_bytes() == (folder / picture.relative_to(straight)).read_bytes()
    cut = folder / f"trace.jsonl.cut-{saved}"
    assert (cut.read_bytes().splitlines() if cut.exists() else []) == lines[saved + 2 :]
    for line in lines[saved + 2 :]:
        repeated = json.loads(line)
        repeated.pop("seconds")
        assert repeated == rows(folder)[repeated["step"]]


@pytest.mark.parametrize(("optimizer", "rate"), [("sam", 0.5), ("prodigy", 1.0)])
def test_under_another_optimizer_a_killed_run_goes_on_bit_for_bit(
    config: TextualInversionConfig, tmp_path: Path, optimizer: str, rate: float
) -> None:
    pytest.importorskip("prodigyopt")
    other = replace(config, optimizer=optimizer, learning_rate=rate, gradient_accumulation_steps=2)  # type: ignore[arg-type]
    whole = personalise(replace(other, output_dir=str(tmp_path / "whole"))).folder
    with pytest.raises(Killed):
        personalise(other, [killed_at(6)])
    resumed = personalise(replace(other, resume_from_checkpoint="latest")).folder
    assert torch.equal(embeds(resumed), embeds(whole))
    assert rows(resumed) == rows(whole)
    assert not torch.equal(embeds(whole), Checkpoint.read(whole / "checkpoint-0").state["<thing>"])


def test_resuming_from_a_named_checkpoint(config: TextualInversionConfig, straight: Path) -> None:
    personalise(config)
    personalise(replace(config, resume_from_checkpoint="checkpoint-4"))
    folder = Path(config.output_dir)
    assert torch.equal(embeds(folder), embeds(straight))
    assert rows(folder) == rows(straight)


def test_a_damaged_checkpoint_is_passed_over(config: TextualInversionConfig, straight: Path) -> None:
    with pytest.raises(Killed):
        personalise(config, [killed_at(9)])
    folder = Path(config.output_dir)
    (folder / "checkpoint-8" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="checkpoint-8 is damaged"):
        personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(embeds(folder), embeds(straight))
    assert rows(folder) == rows(straight)


def test_a_run_stopped_by_the_cap_goes_on_under_a_higher_cap(config: TextualInversionConfig, straight: Path) -> None:
    shorter = replace(config, max_train_steps=9)
    folder = personalise(shorter).folder
    assert (folder / "result.json").exists()
    unfinished: list[bool] = []
    resumed = replace(config, resume_from_checkpoint="latest", extend=True)
    personalise(resumed, [lambda step: unfinished.append(not (folder / "result.json").exists())])
    assert unfinished == [True] * 3
    assert torch.equal(embeds(folder), embeds(straight))
    assert rows(folder) == rows(straight)
    assert json.loads((folder / "result.json").read_text())["steps"] == CAP


def test_resuming_a_finished_run_changes_nothing(config: TextualInversionConfig) -> None:
    first = personalise(config)
    before = embeds(first.folder)
    seen: list[StepRecord] = []
    second = personalise(replace(config, resume_from_checkpoint="latest"), [seen.append])
    assert seen == []
    assert (second.verdict, second.steps, second.best_step) == (first.verdict, first.steps, first.best_step)
    assert torch.equal(embeds(first.folder), before)


@pytest.mark.parametrize(
    ("change", "said"),
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
    config: TextualInversionConfig, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(Killed):
        personalise(config, [killed_at(5)])
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=re.escape(said)):
        personalise(replace(config, resume_from_checkpoint="latest", **change))
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


def test_a_checkpoint_from_before_a_setting_existed_was_made_under_its_default(
    config: TextualInversionConfig, straight: Path
) -> None:
    with pytest.raises(Killed):
        personalise(config, [killed_at(5)])
    kept = latest_checkpoint(Path(config.output_dir))
    older = {name: value for name, value in kept.facts["config"].items() if name != "attention_slicing"}
    replace(kept, facts={**kept.facts, "config": older}).write(Path(config.output_dir))
    with pytest.raises(CheckpointError, match="attention_slicing was False and is True"):
        personalise(replace(config, resume_from_checkpoint="latest", attention_slicing=True))
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(embeds(Path(config.output_dir)), embeds(straight))


def test_a_checkpoint_of_other_pictures_is_refused(config: TextualInversionConfig, tmp_path: Path) -> None:
    from dvar.testing import tiny_concept

    with pytest.raises(Killed):
        personalise(config, [killed_at(5)])
    other = tiny_concept(tmp_path / "other", size=80)
    with pytest.raises(CheckpointError, match="the images or their captions changed"):
        personalise(replace(config, resume_from_checkpoint="latest", instance_data_dir=str(other)))


def test_a_checkpoint_on_another_base_model_is_refused(
    config: TextualInversionConfig, tmp_path: Path, tiny_model: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    moved = replace(config, pretrained_model_name_or_path=str(model))
    with pytest.raises(Killed):
        personalise(moved, [killed_at(5)])
    shutil.rmtree(model)
    tiny_pipeline(model, seed=1)
    before = {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"made on another base model \(its SHA-256 was \w{12}\.\.\. and is"):
        personalise(replace(moved, resume_from_checkpoint="latest"))
    assert {path: path.read_bytes() for path in Path(config.output_dir).rglob("*") if path.is_file()} == before


def test_a_run_that_stopped_by_itself_takes_no_further_step(config: TextualInversionConfig) -> None:
    soon = replace(config, threshold=0.999, max_train_steps=100)
    first = personalise(soon)
    seen: list[StepRecord] = []
    changes: tuple[dict[str, Any], ...] = ({}, {"extend": True, "max_train_steps": 200})
    for change in changes:
        again = personalise(replace(soon, resume_from_checkpoint="latest", **change), [seen.append])
        assert (again.steps, again.verdict.reason) == (first.steps, Reason.STABILISED)
    assert seen == []


@pytest.mark.parametrize(("keep", "exported", "beside"), [("last", CAP, 0), ("best", 5, 0), ("last,best", CAP, 1)])
def test_what_is_kept_is_what_was_asked_for(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch, keep: Any, exported: int, beside: int
) -> None:
    true, calls = denoising_loss, iter(range(10**6))
    monkeypatch.setattr(dvar.training.run, "denoising_loss", lambda *given: true(*given) + (next(calls) >= 12))
    folder = personalise(replace(config, keep=keep, checkpointing_steps=1)).folder
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["exported_step"], facts["best_step"], facts["best_by"]) == (exported, 5, "l_det")
    assert torch.equal(embeds(folder), Checkpoint.read(folder / f"checkpoint-{exported}").state["<thing>"])
    assert len(list(folder.glob("learned_embeds-steps-5.safetensors"))) == beside
    assert set(facts["weights"]) | set(facts["best_weights"]) == {path.name for path in folder.glob("*.safetensors")}


def test_another_run_is_replaced_only_when_asked_and_only_what_a_run_writes(config: TextualInversionConfig) -> None:
    folder = personalise(config).folder
    (folder / "notes.txt").write_text("mine")
    (folder / "report.html").write_text("of the old run")
    before = embeds(folder)
    with pytest.raises(RefusedInput, match="overwrite"):
        personalise(replace(config, seed=1))
    with pytest.raises(RefusedInput, match="initializer_token"):
        personalise(replace(config, seed=1, overwrite=True, initializer_token="unheard-of"))
    assert torch.equal(embeds(folder), before)
    personalise(replace(config, seed=1, overwrite=True, max_train_steps=10))
    assert not torch.equal(embeds(folder), before)
    assert (folder / "notes.txt").read_text() == "mine"
    assert not (folder / "report.html").exists()
    assert not (folder / "checkpoint-12").exists()


def test_everything_wrong_is_told_at_once_before_a_model_loads(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StableDiffusion, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    wrong = replace(config, instance_data_dir="nowhere", placeholder_token="mug", window=50)
    with pytest.raises(RefusedInput) as told:
        personalise(wrong)
    assert len(told.value.problems) == 3
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_bit_for_bit(
    config: TextualInversionConfig, straight: Path, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)

    def send(step: StepRecord) -> None:
        if step.step == 6:
            os.kill(os.getpid(), number)

    result = personalise(config, [send])
    assert result.verdict.reason is Reason.INTERRUPTED
    assert result.steps == 7
    assert latest_checkpoint(result.folder).step == 7
    assert not (result.folder / "result.json").exists()
    assert signal.getsignal(number) is handler
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert torch.equal(embeds(result.folder), embeds(straight))
    assert rows(result.folder) == rows(straight)


@pytest.mark.parametrize("optimizer", ["adamw", "sam"])
def test_a_signal_within_an_update_gives_it_up_and_the_run_goes_on_bit_for_bit(
    config: TextualInversionConfig, tmp_path: Path, optimizer: Any
) -> None:
    long = replace(config, gradient_accumulation_steps=4, optimizer=optimizer)
    whole = personalise(replace(long, output_dir=str(tmp_path / "whole"))).folder
    true, passes = denoising_loss, iter(range(10**6))
    # An evaluation and an update take turns; this is the second to last pass of update 6, of SAM's second look.
    asked = 1 + 5 * 5 + 2 if optimizer == "adamw" else 1 + 5 * 9 + 6

    def loss(*given: Any) -> torch.Tensor:
        if next(passes) == asked:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvar.training.run, "denoising_loss", loss)
        result = personalise(long)
    assert next(passes) == asked + 1, "no pass came after it"
    assert result.verdict.reason is Reason.INTERRUPTED
    assert (
        result.steps
        == result.verdict.step
        == latest_checkpoint(result.folder).step
        == rows(result.folder)[-1]["step"]
        == 5
    )
    personalise(replace(long, resume_from_checkpoint="latest"))
    assert torch.equal(embeds(result.folder), embeds(whole))
    assert rows(result.folder) == rows(whole)


def asked_in_drawing(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Send SIGTERM within the drawing of this number, the untouched model's being 0; returns a list of all drawings."""
    true, drawings = sample_into, list[int]()

    def drawing(folder: Path, *given: Any, interrupted: Callable[[], bool], **how: Any) -> list[Path]:
        drawings.append(len(drawings))
        if drawings[-1] == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(folder, *given, interrupted=interrupted, **how)

    monkeypatch.setattr(dvar.training.run, "sample_into", drawing)
    return drawings


@pytest.mark.parametrize("number", [0, 1])
def test_a_signal_ends_the_drawing_of_samples_and_the_run_goes_on_to_the_same_pictures(
    config: TextualInversionConfig, straight: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    with monkeypatch.context() as patch:
        drawings = asked_in_drawing(patch, number)
        result = personalise(config)
    assert len(drawings) == number + 1
    assert result.verdict.reason is Reason.INTERRUPTED
    assert result.steps == result.verdict.step == latest_checkpoint(result.folder).step == 5 * number
    assert not (result.folder / "samples" / f"step-{5 * number:06d}").exists()
    personalise(replace(config, resume_from_checkpoint="latest"))
    assert rows(result.folder) == rows(straight)
    for picture in sorted((straight / "samples").rglob("*.png")):
        assert picture.read_bytes() == (result.folder / picture.relative_to(straight)).read_bytes()


# Drawings are those that are scored, at 0, 5, 10 and the cap of 12; each is then met again as the samples of its step.
@pytest.mark.parametrize(
    ("number", "step"),
    [pytest.param(0, 0, marks=pytest.mark.slow), (2, 5), pytest.param(6, 12, marks=pytest.mark.slow)],
)
def test_a_signal_in_the_drawing_of_what_is_scored_loses_neither_score_nor_best_step(
    config: TextualInversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    judged = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")))
    straight = personalise(replace(judged, output_dir=str(tmp_path / "straight")))
    with monkeypatch.context() as patch:
        asked_in_drawing(patch, number)
        result = personalise(judged)
    assert result.verdict.reason is Reason.INTERRUPTED
    assert latest_checkpoint(result.folder).step == step
    assert "clip_image" not in rows(result.folder)[-1]
    again = personalise(replace(judged, resume_from_checkpoint="latest"))
    assert rows(again.folder) == rows(straight.folder)
    assert again.best_step == straight.best_step
    assert torch.equal(embeds(again.folder), embeds(straight.folder))


def test_a_signal_at_the_last_step_leaves_what_follows_to_the_run_that_goes_on(
    config: TextualInversionConfig, straight: Path
) -> None:
    def send(step: StepRecord) -> None:
        if step.step == CAP - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    result = personalise(config, [send])
    assert (result.verdict.reason, result.steps) == (Reason.INTERRUPTED, CAP)
    assert not (result.folder / "result.json").exists()
    assert personalise(replace(config, resume_from_checkpoint="latest")).verdict.reason is Reason.CAP
    assert torch.equal(embeds(result.folder), embeds(straight))


def test_a_second_signal_ends_at_once(config: TextualInversionConfig) -> None:
    def send(step: StepRecord) -> None:
        if step.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        personalise(config, [send])
    assert latest_checkpoint(Path(config.output_dir)).step == 0


def spoiled(monkeypatch: pytest.MonkeyPatch, calls: range) -> None:
    """Make the losses nan at these calls of the objective, and from the eighth call on look worse than they are."""
    true, count = denoising_loss, iter(range(10**6))

    def loss(*arguments: Any) -> torch.Tensor:
        call = next(count)
        return true(*arguments) + (float("nan") if call in calls else call >= 8)

    monkeypatch.setattr(dvar.training.run, "denoising_loss", loss)


# Call 0 evaluates the untouched model; then come an update and its evaluation in turn: 13 is update 7, 14 follows it.
@pytest.mark.parametrize("call", [13, 14])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_best_is_exported(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    spoiled(monkeypatch, range(call, call + 1))
    result = personalise(replace(config, checkpointing_steps=1))
    folder = result.folder
    assert result.verdict.reason is Reason.NON_FINITE
    assert (result.steps, result.best_step) == (7, 3)
    assert latest_checkpoint(folder).step == 6
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["exported_step"], facts["stopped"]) == (3, False)
    best = Checkpoint.read(folder / "checkpoint-3").tensors["method/<thing>"]
    assert torch.equal(embeds(folder), best)
    assert not list(folder.glob("learned_embeds-steps-*"))
    assert not torch.equal(best, latest_checkpoint(folder).tensors["method/<thing>"])


def test_when_nothing_was_finite_nothing_is_exported(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled(monkeypatch, range(10**6))
    with pytest.raises(NonFiniteLoss, match="nothing is exported"):
        personalise(config)
    assert not list(Path(config.output_dir).glob("learned_embeds*"))
    assert not (Path(config.output_dir) / "result.json").exists()


@pytest.mark.parametrize("vectors", [1, 3])
def test_stock_diffusers_loads_the_word_and_draws_our_picture(
    config: TextualInversionConfig, tiny_model: Path, vectors: int
) -> None:
    folder = personalise(replace(config, num_vectors=vectors, learning_rate=0.5)).folder
    with safe_open(folder / "learned_embeds.safetensors", "pt") as file:
        assert list(file.keys()) == ["<thing>"]
        assert file.get_tensor("<thing>").shape == (vectors, 32)
        assert file.get_tensor("<thing>").dtype == torch.float32

    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)

    def drawn(prompt: str) -> np.ndarray[Any, Any]:
        seed = torch.Generator().manual_seed(5)
        return np.asarray(stock(prompt, generator=[seed], height=32, width=32, num_inference_steps=2).images[0])

    before = drawn("a photo of <thing> on the beach")
    initial = drawn("a photo of mug on the beach")
    stock.load_textual_inversion(folder)
    learned = drawn("a photo of <thing> on the beach")
    assert not np.array_equal(learned, before)
    assert not np.array_equal(learned, initial)
    backbone = load_personalised_backbone(folder, device="cpu")
    ours = sample(backbone, ["a photo of <thing> on the beach"], [5], size=32, steps=2)
    assert np.array_equal(np.asarray(ours[0]), learned)
    assert np.array_equal(drawn("a photo of mug on the beach"), initial)


def test_sample_pictures_are_those_of_the_exported_word(config: TextualInversionConfig, tiny_model: Path) -> None:
    folder = personalise(replace(config, num_vectors=2)).folder
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    stock.set_progress_bar_config(disable=True)
    stock.load_textual_inversion(folder)
    listed = json.loads((folder / "samples" / "prompts.json").read_text())
    seeds = [torch.Generator().manual_seed(entry["seed"]) for entry in listed]
    prompts = [entry["prompt"] for entry in listed]
    expected = stock(prompts, generator=seeds, height=32, width=32, num_inference_steps=2).images
    for index, picture in enumerate(expected):
        image = Image.open(folder / "samples" / f"step-{CAP:06d}" / f"{index:02d}.png")
        assert np.array_equal(np.asarray(image), np.asarray(picture))


def test_the_best_step_is_exported_beside_the_last(
    config: TextualInversionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, calls = denoising_loss, iter(range(10**6))
    # The evaluations are calls 0, 2, 4, ...; from step 6 on they are made to look worse.
    monkeypatch.setattr(dvar.training.run, "denoising_loss", lambda *given: true(*given) + (next(calls) >= 12))
    kept: dict[int, torch.Tensor] = {}
    result = personalise(replace(config, checkpointing_steps=1))
    for step in range(CAP + 1):
        kept[step] = Checkpoint.read(result.folder / f"checkpoint-{step}").tensors["method/<thing>"]
    assert result.best_step == 5
    best = load_file(result.folder / "learned_embeds-steps-5.safetensors")["<thing>"]
    assert torch.equal(best, kept[5])
    assert torch.equal(embeds(result.folder), kept[CAP])


def test_pictures_are_shown_mirrored_too_unless_told_not_to(config: TextualInversionConfig, tmp_path: Path) -> None:
    shapes = []
    encode = encode_examples

    def spy(*given: Any, **options: Any) -> Any:
        examples = encode(*given, **options)
        shapes.append(examples.moments.shape)
        return examples

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dvar.training.run, "encode_examples", spy)
        for name, flip in (("flipped", True), ("plain", False)):
            personalise(replace(config, output_dir=str(tmp_path / name), random_flip=flip, max_train_steps=9))
    assert [tuple(shape) for shape in shapes] == [(4, 2, 8, 8, 8), (4, 1, 8, 8, 8)]


def test_a_caption_of_ones_own_is_what_its_picture_is_trained_with(
    config: TextualInversionConfig, tmp_path: Path
) -> None:
    from dvar.testing import tiny_concept

    pictures = tiny_concept(tmp_path / "captioned", images=2)
    (pictures / "00.txt").write_text("a red <thing> on grass")
    texts: list[list[str]] = []
    tokenize = StableDiffusion.tokenize

    def noting(self: StableDiffusion, prompts: list[str]) -> torch.Tensor:
        texts.append(list(prompts))
        return tokenize(self, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "tokenize", noting)
        personalise(replace(config, instance_data_dir=str(pictures), num_vectors=2))
    assert texts[0] == ["a red <thing> <thing>_1 on grass"]
    assert len(texts[1]) > 10
    assert all("<thing> <thing>_1" in text for text in texts[1])


@pytest.mark.filterwarnings("ignore:fp16 on a CPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_vectors(config: TextualInversionConfig, precision: Any) -> None:
    settings = replace(config, mixed_precision=precision, gradient_checkpointing=True, gradient_accumulation_steps=2)
    result = personalise(settings)
    assert embeds(result.folder).dtype == torch.float32
    values = Trace.read(result.folder / "trace.jsonl").values
    # float32 sums: half precision would leave a handful of distinct values, if any.
    assert len(set(values.tolist())) > CAP // 2
    with pytest.raises(Killed):
        personalise(replace(settings, overwrite=True), [killed_at(6)])
    personalise(replace(settings, resume_from_checkpoint="latest"))
    assert np.array_equal(Trace.read(result.folder / "trace.jsonl").values, values)


@pytest.mark.slow
def test_a_compiled_run_is_the_run_that_is_not(config: TextualInversionConfig, straight: Path) -> None:
    compile = torch.compile
    with pytest.MonkeyPatch.context() as patch:  # "eager": all of it but the machine's own compiler
        patch.setattr(torch, "compile", lambda call, **options: compile(call, **{**options, "backend": "eager"}))
        folder = personalise(replace(config, compile=True)).folder
    torch.testing.assert_close(embeds(folder), embeds(straight), rtol=1e-4, atol=1e-5)


def test_the_model_card_tells_no_paths_and_loads(config: TextualInversionConfig, tiny_model: Path) -> None:
    folder = personalise(config).folder
    card = (folder / "README.md").read_text()
    assert str(tiny_model.parent) not in card
    assert "`<thing>`" in card
    assert json.loads((folder / "result.json").read_text())["verdict"]["sentence"] in card
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card):
        assert (folder / picture).exists()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    subprocess.run([sys.executable, "-c", code[1].replace(tiny_model.name, str(tiny_model))], cwd=folder, check=True)
    assert (folder / "image.png").exists()


def test_no_finished_run_to_load(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="no finished run"):
        load_personalised_backbone(tmp_path)


@pytest.mark.slow
def test_a_process_killed_at_random_moments_ends_where_a_straight_run_does(
    config: TextualInversionConfig, straight: Path, tmp_path: Path
) -> None:
    settings = tmp_path / "settings.json"
    script = (
        "import json, sys\nfrom dvar.config.training import TextualInversionConfig\n"
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
    assert torch.equal(embeds(folder), embeds(straight))
    assert rows(folder) == rows(straight)


def test_the_best_by_clip_is_the_step_whose_samples_are_most_like_the_pictures(
    config: TextualInversionConfig, tmp_path: Path
) -> None:
    judged = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")), keep="best")
    plain, folder = personalise(replace(config, output_dir=str(tmp_path / "plain"))).folder, personalise(judged).folder
    clip = Clip.load(judged.clip_model or "")
    references = [Image.open(path).copy() for path in sorted((folder / "references").iterdir())]
    scores = {}
    for step in (0, 5, 10, 12):
        samples = [Image.open(path).copy() for path in sorted((folder / "samples" / f"step-{step:06d}").iterdir())]
        scores[step] = float((clip.embed_images(samples) @ clip.embed_images(references).T).mean())
    trace = Trace.read(folder / "trace.jsonl")
    assert dict(zip(*(part.tolist() for part in trace.metric("clip_image")), strict=True)) == pytest.approx(scores)
    best = max((5, 10, 12), key=lambda step: scores[step])  # the untouched model is none
    facts = json.loads((folder / "result.json").read_text())
    assert (facts["best_step"], facts["exported_step"], facts["best_by"]) == (best, best, "clip")
    # What is scored is drawn all the same: training is that of a run without.
    assert [{name: row[name] for name in row if name != "clip_image"} for row in rows(folder)] == rows(plain)


def test_a_run_judged_by_clip_that_fails_before_its_first_score_exports_the_best_by_its_loss(
    config: TextualInversionConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")), checkpointing_steps=1)
    spoiled(monkeypatch, range(7, 8))  # update 4, before the first score of a trained step, at 5
    result = personalise(judged)
    values = Trace.read(result.folder / "trace.jsonl").values
    facts = json.loads((result.folder / "result.json").read_text())
    assert facts["best_by"] == "l_det"
    assert facts["exported_step"] == facts["best_step"] == int(values.argmin())
    best = Checkpoint.read(result.folder / f"checkpoint-{int(values.argmin())}")
    assert torch.equal(embeds(result.folder), best.state["<thing>"])


def test_a_run_judged_by_clip_goes_on_to_the_same_best_step(config: TextualInversionConfig, tmp_path: Path) -> None:
    judged = replace(config, best_by="clip", clip_model=str(tiny_clip(tmp_path / "clip")))
    straight = personalise(replace(judged, output_dir=str(tmp_path / "straight")))

    def kill(step: StepRecord) -> None:
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        personalise(judged, [kill])
    again = personalise(replace(judged, resume_from_checkpoint="latest"))
    assert rows(again.folder) == rows(straight.folder)
    assert again.best_step == straight.best_step
