"""The whole recipe from nothing, two steps a stage: every stage has its inputs, and the shipped pipeline generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from pretraining import evaluate
from pretraining.__main__ import STAGES
from pretraining.ship import MADE_OF

FEW = {"autoencoder": "--batch 2 --steps 2", "clip": "--batch 4 --steps 2", "latents": "--steps 1"}
FEW |= {"unet": FEW["autoencoder"] + " --bound 25", "recogniser": FEW["autoencoder"]}


@pytest.mark.slow
def test_every_stage_runs_from_nothing_and_the_shipped_pipeline_generates(tmp_path: Path) -> None:
    environment = {**os.environ, "DVAR_PRETRAINING_WORK": str(tmp_path / "work"), "OMP_NUM_THREADS": "1"}
    for stage, arguments in STAGES:
        if stage not in FEW:
            continue
        name = [f"--name {arguments.split()[1]}"] if arguments.startswith("--name") else []
        command = f"-m pretraining.{stage} {' '.join([*name, FEW[stage]])} --threads 1".split()
        subprocess.run([sys.executable, *command], check=True, env=environment, capture_output=True)
    for command in (["ship", "--to", str(tmp_path)], ["soften", "--model", str(tmp_path / "model")]):
        subprocess.run(
            [sys.executable, "-m", f"pretraining.{command[0]}", *command[1:]],
            check=True,
            env=environment,
            capture_output=True,
        )
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a photo of a mug", num_inference_steps=2).images[0].size == (64, 64)
    recipe = json.loads((tmp_path / "recipe.json").read_text())
    assert set(recipe) == set(MADE_OF)
    assert recipe["unet"]["attention_bound"] == recipe["unet"]["softened_to"] == 25
    assert {path.name for path in (tmp_path / "judges").iterdir()} == {
        "clip",
        "clip-conditioner",
        "recogniser.safetensors",
    }


def test_the_model_card_has_the_figures_and_the_recipe_of_what_ships() -> None:
    """Hugging Face reads the metadata between the first two lines of dashes."""
    record, recipe = (
        json.loads((evaluate.ROOT / name).read_text(encoding="utf-8")) for name in ("figures.json", "recipe.json")
    )
    page = (evaluate.ROOT / "README.md").read_text(encoding="utf-8")
    assert page == evaluate.page(record, recipe)
    _, metadata, body = page.split("---\n", 2)
    keys = {line.partition(":")[0] for line in metadata.splitlines() if not line.startswith("- ")}
    assert keys == {"license", "library_name", "pipeline_tag", "language", "tags"}
    assert [line for line in body.splitlines() if line.startswith("## ")] == [
        *("## Uses", "## Training data", "## Limits", "## Evaluation")
    ]
