"""DoRA and LoRA+: what stock diffusers loads, learning rates by factor, a resumed run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.config.methods import DreamBoothLoraConfig
from dvar.config.training import problems
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.sampling import sample
from dvar.errors import RefusedInput
from dvar.runs.export import write_kohya_lora, write_merged_pipeline
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import tiny_flux_pipeline, tiny_pipeline
from dvar.training.loop import Learner, StepRecord
from dvar.training.methods.dreambooth_lora import DreamBoothLora
from dvar.training.personalise import personalise

PROMPT = "a photo of mug"


def build_config(model: Path, images: Path, folder: Path, **changes: Any) -> DreamBoothLoraConfig:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(images),
        "instance_prompt": PROMPT,
        "resolution": 32,
        "learning_rate": 1e-2,
        "use_dora": True,
        "lora_plus_ratio": 4.0,
        "max_train_steps": 9,
        "window": 8,
        "threshold": 1e-9,
        "validation_steps": 9,
        "checkpointing_steps": 4,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "output_dir": str(folder),
    }
    return DreamBoothLoraConfig(**{**shared, **changes})


def generate(folder: Path, run: Path | None = None) -> np.ndarray[Any, Any]:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if run:
        pipeline.load_lora_weights(run, weight_name="pytorch_lora_weights.safetensors")
    generator = torch.Generator().manual_seed(5)
    size: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 4.0}
    return np.asarray(pipeline(prompt=PROMPT, generator=generator, **size).images[0], dtype=np.int64)


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("save", [tiny_pipeline, pytest.param(tiny_flux_pipeline, marks=pytest.mark.slow)])
def test_stock_diffusers_loads_dora_and_generates_the_same_image(
    save: Callable[[Path], Path], text: bool, tiny_images: Path, tmp_path: Path
) -> None:
    model = save(tmp_path / "model")
    config = build_config(model, tiny_images, tmp_path / "run", train_text_encoder=text)
    run = personalise(config).folder
    weights = load_file(run / "pytorch_lora_weights.safetensors")
    rows = {name: part for name, part in weights.items() if ".lora_magnitude_vector" in name}
    assert len(rows) == len(weights) / 3
    assert any(name.startswith("text_encoder.") for name in rows) == text
    (ours,) = sample(load_personalised_backbone(run, device="cpu"), [PROMPT], [5], size=32, steps=2, guidance=4.0)
    theirs = generate(model, run)
    assert np.abs(theirs - np.asarray(ours, dtype=np.int64)).max() <= 1
    assert np.abs(theirs - generate(model)).max() > 1
    assert np.abs(generate(write_merged_pipeline(run, tmp_path / "merged")) - theirs).max() <= 1
    with pytest.raises(RefusedInput, match=r"--kohya writes LoRA alone, and .* is DoRA"):
        write_kohya_lora(run, tmp_path / "lora.safetensors")


def test_a_resumed_run_is_the_whole_one(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    config = build_config(tiny_model, tiny_images, tmp_path / "resumed")
    whole = personalise(replace(config, output_dir=str(tmp_path / "whole")))

    def stop(step: StepRecord) -> None:
        if step.step == 6:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        personalise(config, [stop])
    resumed = personalise(replace(config, resume_from_checkpoint="latest"))
    first, second = (load_file(run.weights[0]) for run in (whole, resumed))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_second_factors_learn_at_the_ratio(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    """AdamW's first step moves every weight by its learning rate, whatever the gradient."""
    config = build_config(tiny_model, tiny_images, tmp_path / "run", use_dora=False, adam_weight_decay=0.0)
    method = DreamBoothLora(load_backbone(tiny_model, device="cpu"), plus_ratio=4.0)
    learner = Learner(method, config, {})
    before = [matrix.detach().clone() for matrix in method.parameters]

    def losses(step: int, first: int, count: int) -> torch.Tensor:
        return torch.stack([sum(((matrix - 9).square().sum() for matrix in method.parameters), torch.zeros(()))])

    learner.update(losses, 1)
    moves = {
        name.rpartition(".lora_")[2]: float((matrix.detach() - old).abs().mean())
        for (name, matrix), old in zip(method.matrices.items(), before, strict=True)
    }
    assert moves["A.weight"] == pytest.approx(1e-2, rel=1e-3)
    assert moves["B.weight"] == pytest.approx(4e-2, rel=1e-3)


def test_without_a_ratio_the_optimizer_has_one_group(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    config = build_config(tiny_model, tiny_images, tmp_path / "run", use_dora=False, lora_plus_ratio=None)
    learner = Learner(DreamBoothLora(load_backbone(tiny_model, device="cpu")), config, {})
    assert len(learner.optimizer.param_groups) == 1
    assert "factor" not in learner.optimizer.param_groups[0]


def test_an_optimizer_that_finds_its_rate_is_refused(tiny_images: Path, tmp_path: Path) -> None:
    config = build_config(tmp_path, tiny_images, tmp_path / "run", optimizer="prodigy", learning_rate=1.0)
    (problem,) = problems(config)
    assert problem.startswith("lora_plus_ratio needs an optimizer with learning rates of ours")
