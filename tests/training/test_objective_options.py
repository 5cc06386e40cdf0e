"""Options of the objective in a run: they change what trains and leave L_det alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dvar.config.methods import DreamBoothLoraConfig
from dvar.errors import RefusedInput
from dvar.testing import tiny_flux_pipeline
from dvar.training import family_fit
from dvar.training.personalise import personalise, prepare
from dvar.training.run import TrainingRun


def build_config(model: Path, images: Path, folder: Path, **changes: Any) -> DreamBoothLoraConfig:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(images),
        "instance_prompt": "a photo of mug",
        "resolution": 32,
        "learning_rate": 5e-2,
        "max_train_steps": 9,
        "window": 8,
        "threshold": 1e-9,
        "output_dir": str(folder),
    }
    return DreamBoothLoraConfig(**{**shared, **changes})


def prepare_run(model: Path, images: Path, folder: Path, **changes: Any) -> TrainingRun:
    return prepare(build_config(model, images, folder, **changes))[0]


OPTIONS: list[dict[str, Any]] = [
    {"snr_gamma": 0.1},
    {"noise_offset": 0.3},
    {"caption_dropout": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_changes_the_training_loss_and_leaves_l_det(
    options: dict[str, Any], tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    plain = prepare_run(tiny_model, tiny_images, tmp_path / "plain")
    changed = prepare_run(tiny_model, tiny_images, tmp_path / "changed", **options)
    assert torch.equal(changed.probe(), plain.probe())
    losses, others = plain.training_losses(1, 0, 4), changed.training_losses(1, 0, 4)
    assert not torch.equal(losses, others)
    again = prepare_run(tiny_model, tiny_images, tmp_path / "again", **options)
    assert torch.equal(again.training_losses(1, 0, 4), others)


def test_a_weight_multiplies_the_loss_of_its_timestep(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    plain = prepare_run(tiny_model, tiny_images, tmp_path / "plain")
    weighted = prepare_run(tiny_model, tiny_images, tmp_path / "weighted", snr_gamma=0.1)
    timesteps = plain.draw(plain.examples, "train", 1, 0, 4).timesteps
    ratio = (plain.schedule.signals / plain.schedule.spreads)[timesteps] ** 2
    expected = plain.training_losses(1, 0, 4) * ratio.clamp(max=0.1) / ratio
    torch.testing.assert_close(weighted.training_losses(1, 0, 4), expected)
    assert (ratio > 0.1).any(), "no sample has a weight other than 1"


def test_a_run_with_every_option_ends_and_has_its_files(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    options = {"snr_gamma": 5.0, "noise_offset": 0.1, "caption_dropout": 0.1, "timestep_sampling": "shifted"}
    samples = {"num_validation_images": 1, "num_inference_steps": 1}
    run = personalise(build_config(tiny_model, tiny_images, tmp_path / "run", **options, **samples))
    assert run.steps == 9
    assert [path.name for path in run.weights] == ["pytorch_lora_weights.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"snr_gamma": 5.0}, "snr_gamma is for models that predict noise, and a FLUX.1 matches flows: use loss_weigh"),
        ({"attention_slicing": True}, "attention_slicing is for a U-Net, and a FLUX.1 has none: drop it"),
        ({"resolution": 40}, "resolution must be a multiple of 16 on a FLUX.1, got 40: try 32"),
        ({"lora_targets": "cross-attention"}, "lora_targets of FLUX.1 must be one of attention, got 'cross-attention"),
        ({"validation_scheduler": "DDIMScheduler"}, "validation_scheduler must be model on a FLUX.1, which matches fl"),
    ],
)
def test_what_a_family_of_flow_matching_lacks_is_refused_before_it_loads(
    options: dict[str, Any], message: str, tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_flux_pipeline(tmp_path / "model")
    monkeypatch.setattr("dvar.training.personalise.load_backbone", None)
    with pytest.raises(RefusedInput) as error:
        personalise(build_config(model, tiny_images, tmp_path / "run", **options))
    assert any(problem.startswith(message) for problem in error.value.problems), error.value.problems


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 256}, "got 256: try 128"),
        ({"aspect_ratio_buckets": "64,64;112,144", "resolution": 64}, "got 112,144: lower resolution, or name smaller"),
        ({"aspect_ratio_buckets": "auto", "resolution": 128}, "got 80,160: lower resolution, or name smaller sizes"),
    ],
)
def test_images_that_the_positions_of_a_model_do_not_reach_are_refused(
    options: dict[str, Any], message: str, tiny_images: Path, tmp_path: Path
) -> None:
    config = build_config(Path("mini-flow"), tiny_images, tmp_path / "run", **options)
    (problem,) = family_fit.problems(config)
    assert " must be at most 128 on this Stable Diffusion 3 or 3.5, whose positions reach no further, got " in problem
    assert message in problem


def test_the_largest_images_that_the_positions_of_a_model_reach_are_accepted(tiny_images: Path, tmp_path: Path) -> None:
    sizes = {"resolution": 128, "aspect_ratio_buckets": "128,128;96,128"}
    config = build_config(Path("mini-flow"), tiny_images, tmp_path / "run", **sizes)
    assert family_fit.problems(config) == []


def test_more_denoising_steps_than_the_schedule_has_are_refused(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_train_timesteps": 20}))
    for steps, expected in ((20, []), (21, ["num_inference_steps must be at most 20, the steps of the model's"])):
        config = build_config(model, tiny_images, tmp_path / "run", num_inference_steps=steps)
        assert [problem.partition(" schedule")[0] for problem in family_fit.problems(config)] == expected


def test_weights_of_flow_matching_are_refused_for_a_model_of_diffusion(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedInput, match="loss_weighting is for models that match flows, and a Stable Diffusion"):
        personalise(build_config(tiny_model, tiny_images, tmp_path / "run", loss_weighting="cosmap"))
