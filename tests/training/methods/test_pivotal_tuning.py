"""Pivotal tuning: a new word and LoRA, then LoRA alone, which the rule judges."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.config.methods import DreamBoothLoraConfig
from dvar.config.training import problems
from dvar.errors import CheckpointError
from dvar.runs.replay import replay_rule
from dvar.stopping.octave import Octave
from dvar.stopping.rules import Dvar, EmaPercentile, Hall, Plateau, Trend
from dvar.stopping.trace import Trace
from dvar.testing import tiny_concept, tiny_xl_pipeline
from dvar.training import rule
from dvar.training.checkpoint import Checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise, prepare
from dvar.training.run_layout import CLIP_EMBEDS, LORA, checkpoint_name

WORDS = {"clip_l", "clip_g"}
PIVOT, CAP = 10, 20


class Halted(Exception):
    """A run was stopped by its test."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_xl_pipeline(tmp_path_factory.mktemp("xl") / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_concept(tmp_path_factory.mktemp("images") / "images")


def build_config(model: Path, images: Path, folder: Path, **changes: Any) -> DreamBoothLoraConfig:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(images),
        "placeholder_token": "<thing>",
        "initializer_token": "mug",
        "train_text_encoder_ti": True,
        "resolution": 32,
        "learning_rate": 5e-2,
        "train_batch_size": 1,
        "eval_batch_size": 2,
        "max_train_steps": CAP,
        "window": 8,
        "threshold": 1e-9,
        "validation_steps": CAP,
        "checkpointing_steps": 4,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "output_dir": str(folder),
    }
    return DreamBoothLoraConfig(**{**shared, **changes})


def test_the_word_is_learned_up_to_the_pivot_and_then_frozen(model: Path, images: Path, tmp_path: Path) -> None:
    config = build_config(model, images, tmp_path / "run", text_encoder_lr=2.5e-2)
    assert config.pivot_step == PIVOT
    run, _ = prepare(config)
    run.open(None)
    learner = run.learner
    rates = {group.get("factor", 1.0): len(group["params"]) for group in learner.optimizer.param_groups}
    assert rates == {0.5: 2, 1.0: len(learner.method.parameters) - 2}
    states = []
    for step in run.steps(lambda: False):
        states.append(learner.method.state)
        encoders = [tower.encoder for tower in run.backbone.towers]
        is_trained = any(weight.requires_grad for encoder in encoders for weight in encoder.parameters())
        assert is_trained == (step.step <= PIVOT), step.step
        assert step.verdict.metrics["seen"] == max(0, step.step - PIVOT)
    for name in states[0]:
        moved = [not torch.equal(before[name], after[name]) for before, after in pairwise(states)]
        assert all(moved[1:PIVOT]), name  # the first factors have no gradient in the first step
        assert moved[PIVOT:] == [name not in WORDS] * (CAP - PIVOT), name


@pytest.mark.slow
@pytest.mark.parametrize("halt", [6, 14])
def test_a_run_that_is_resumed_before_or_after_the_pivot_is_the_whole_one(
    halt: int, model: Path, images: Path, tmp_path: Path
) -> None:
    config = build_config(model, images, tmp_path / "resumed")
    whole = personalise(replace(config, output_dir=str(tmp_path / "whole")))

    def stop(step: StepRecord) -> None:
        if step.step == halt:
            raise Halted

    with suppress(Halted):
        personalise(config, [stop])
    resumed = personalise(replace(config, resume_from_checkpoint="latest"))
    traces = [Trace.read(run.folder / "trace.jsonl") for run in (whole, resumed)]
    assert traces[0].values.tolist() == traces[1].values.tolist()
    assert [trace.judged_from for trace in traces] == [PIVOT, PIVOT]
    for name in (CLIP_EMBEDS, LORA):
        tensors, others = load_file(whole.folder / name), load_file(resumed.folder / name)
        assert all(torch.equal(tensor, others[key]) for key, tensor in tensors.items()), name
    pivot = Checkpoint.read(whole.folder / checkpoint_name(12)).state
    assert all(torch.equal(pivot[key], part) for key, part in load_file(whole.folder / CLIP_EMBEDS).items())
    with pytest.raises(CheckpointError, match="max_train_steps was 20 and is 30"):
        personalise(replace(config, resume_from_checkpoint="latest", max_train_steps=30, extend=True))


def record(trace: Trace, values: np.ndarray[Any, Any]) -> Trace:
    for step, value in enumerate(values):
        trace.record(step, [value, 2 * value])
    return trace


def find_stops(trace: Trace, judge: Any) -> list[int]:
    return [verdict.step for verdict in replay_rule(trace, judge) if verdict.stop]


@pytest.mark.parametrize(
    "judge",
    [
        *(Dvar(20, 0.2), Dvar(20, 0.2, strict_paper=True), EmaPercentile(20, 1e-3), Hall(20, 0.05)),
        *(Trend(20, 1e-5), Plateau("eval", 20, 1e-3), Octave(first_step=32)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_every_rule_judges_a_trace_from_the_step_that_its_header_says(judge: Any) -> None:
    generator = np.random.default_rng(0)
    part = 1 + np.exp(-np.arange(150) / 15) + 1e-4 * generator.standard_normal(150)
    # Converged long before the pivot, and then down to another level: as a word that has been learned, and LoRA.
    both = np.concatenate([2 * part, part])
    stops = find_stops(record(Trace({"judged_from": 150}), both), judge)
    expected = [150 + step for step in find_stops(record(Trace(), part), judge)]
    if getattr(judge, "strict_paper", False):  # leaves out step 0, which is the untouched model
        assert stops[0] > 150
    else:
        assert stops == expected
    assert stops
    assert min(find_stops(record(Trace(), both), judge)) < 150


def test_the_rule_of_a_run_needs_a_window_after_the_pivot(model: Path, images: Path, tmp_path: Path) -> None:
    config = build_config(model, images, tmp_path / "run", train_text_encoder_ti_frac=0.7)
    assert rule.problems(config) == [
        "window must be smaller than the steps with a frozen word, got window 8 and 6 steps: shorten it, "
        "or lower train_text_encoder_ti_frac"
    ]
    assert rule.problems(replace(config, train_text_encoder_ti_frac=0.5)) == []
    assert rule.problems(replace(config, train_text_encoder_ti=False, train_text_encoder_ti_frac=None)) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_text_encoder": True}, "train_text_encoder_ti and train_text_encoder exclude each other, got both: "),
        (
            {"placeholder_token": None, "initializer_token": None, "instance_prompt": "a mug"},
            "train_text_encoder_ti learns a new word first, got no placeholder_token: give the new word",
        ),
        ({"train_text_encoder_ti_frac": 1.0}, "train_text_encoder_ti_frac must be above 0 and below 1, got 1.0"),
        ({"train_text_encoder_ti_frac": 0.01}, "train_text_encoder_ti_frac of max_train_steps must be a step at least"),
        (
            {"train_text_encoder_ti": False, "train_text_encoder_ti_frac": 0.3},
            "train_text_encoder_ti_frac is for pivotal tuning, got 0.3 without it: add --train_text_encoder_ti",
        ),
        (
            {"text_encoder_lr": 1e-4, "optimizer": "prodigy", "learning_rate": 1.0},
            "text_encoder_lr needs an optimizer with learning rates of ours, and prodigy finds one for all: drop one",
        ),
    ],
)
def test_what_pivotal_tuning_cannot_do_is_refused(
    changes: dict[str, Any], message: str, model: Path, images: Path, tmp_path: Path
) -> None:
    (problem,) = problems(build_config(model, images, tmp_path / "run", **changes))
    assert problem.startswith(message)


def test_a_learning_rate_of_the_text_encoder_needs_something_of_it_that_learns() -> None:
    config = DreamBoothLoraConfig(instance_data_dir="images", instance_prompt="a mug", text_encoder_lr=1e-4)
    (problem,) = problems(config)
    assert problem == (
        "text_encoder_lr needs a placeholder_token or train_text_encoder, got 0.0001 without either: add one of them"
    )
    assert problems(replace(config, train_text_encoder=True)) == []
