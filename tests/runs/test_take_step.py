"""An earlier step made the result of a finished run, and a checkpoint on request while a run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from short_run import Outcome, short_run

from dvar.config.methods import TextualInversionConfig
from dvar.errors import FolderInUse, RefusedInput
from dvar.files import read_json
from dvar.locks import lock_folder
from dvar.runs.load_model import load_personalised_backbone
from dvar.runs.run_folder import RunFolder
from dvar.runs.take_step import take_step
from dvar.training.checkpoint import Checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise
from dvar.training.run_layout import RESULT, SAVE_REQUEST, checkpoint_name, checkpoint_paths, checkpoint_step

EMBEDS = "learned_embeds.safetensors"


@pytest.fixture
def config(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> TextualInversionConfig:
    return replace(short_run(tiny_model, tiny_images, tmp_path / "run"), checkpointing_steps=3, validation_steps=3)


def test_the_weights_of_a_taken_step_are_those_of_its_checkpoint_and_none_is_lost(
    config: TextualInversionConfig,
) -> None:
    folder = personalise(config).folder
    before, last = load_file(folder / EMBEDS)["<thing>"], read_json(folder / RESULT)["exported_step"]
    verdict = read_json(folder / RESULT)["verdict"]
    (path,) = take_step(folder, 3)
    run = RunFolder.open(folder)
    assert path == folder / EMBEDS
    assert run.exported_step == 3
    assert run.result is not None
    assert run.result["verdict"] == verdict
    vectors = load_file(path)["<thing>"]
    (saved,) = Checkpoint.read(folder / checkpoint_name(3)).state.values()
    assert torch.equal(vectors, saved.reshape(vectors.shape))
    with safe_open(path, "pt") as file:
        assert file.metadata()["step"] == "3"
    assert torch.equal(load_file(folder / f"learned_embeds-steps-{last}.safetensors")["<thing>"], before)
    assert all((folder / name).exists() for name in run.result["best_weights"])
    load_personalised_backbone(folder)
    take_step(folder, last)
    assert torch.equal(load_file(folder / EMBEDS)["<thing>"], before), "and back"


def test_a_step_without_a_checkpoint_or_of_a_run_in_use_is_refused(config: TextualInversionConfig) -> None:
    folder = personalise(config).folder
    content = (folder / EMBEDS).read_bytes()
    with pytest.raises(RefusedInput, match=r"--step must be a step with a checkpoint, 0, 3, .* got 4: name one"):
        take_step(folder, 4)
    with lock_folder(folder), pytest.raises(FolderInUse):
        take_step(folder, 3)
    assert (folder / EMBEDS).read_bytes() == content


def test_a_run_saves_on_request_and_goes_on_as_if_nothing_had_been(
    config: TextualInversionConfig, tmp_path: Path
) -> None:
    undisturbed = Outcome.of(personalise(replace(config, output_dir=str(tmp_path / "other"))).folder)
    folder = Path(config.output_dir)

    def ask(step: StepRecord) -> None:
        if step.step == 4:
            (folder / SAVE_REQUEST).write_bytes(b"")

    personalise(config, [ask])
    assert [checkpoint_step(path) for path in checkpoint_paths(folder)][::-1] == [0, 3, 5, 6, 9]
    assert not (folder / SAVE_REQUEST).exists()
    assert Outcome.of(folder) == undisturbed
