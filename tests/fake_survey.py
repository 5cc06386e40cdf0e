"""Runs and surveys without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from fake_run import generate_trace, write_run
from PIL import Image

from dvar.runs.generate import hash_result
from dvar.runs.run_folder import RunFolder
from dvar.survey.build import build_survey
from dvar.survey.config import SurveyBuildConfig
from dvar.survey.survey import Survey
from dvar.training.run_layout import GENERATED, GENERATED_LIST

SCENES = ("on the beach", "<script>alert('x')</script>", "at night")


def write_run_with_images(
    folder: Path, seed: int, *, side: int = 64, scenes: tuple[str, ...] = SCENES, **settings: Any
) -> Path:
    """Write a finished run with two sample images and two images of each scene; ``seed`` decides what they show."""
    trace = generate_trace(steps=8)
    write_run(folder, trace, sampled_every=0, images=settings.pop("references", 4), **settings)
    generator = np.random.default_rng(seed)
    last = folder / "samples" / f"step-{trace.last_step:06d}"
    for number in range(2):
        _write_image(last / f"{number:02d}.png", generator, side)
    prompts = [{"prompt": "a photo of <thing>", "seed": number} for number in range(2)]
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    run = RunFolder.open(folder)
    settings_row = {
        "num_inference_steps": run.settings.num_inference_steps,
        "guidance_scale": run.settings.guidance_scale,
    }
    rows = []
    for number, (scene, at) in enumerate((scene, at) for scene in scenes for at in range(2)):
        _write_image(folder / GENERATED / f"{number:02d}.png", generator, side)
        row = {"path": f"{number:02d}.png", "prompt": f"a photo of <thing> {scene}", "seed": at}
        rows.append(json.dumps({**row, "result": hash_result(run), **settings_row}))
    if rows:
        (folder / GENERATED / GENERATED_LIST).write_text("\n".join(rows) + "\n")
    return folder


def write_rival_runs(place: Path, **settings: Any) -> tuple[Path, Path]:
    """Write two runs of one concept and one method."""
    return write_run_with_images(place / "stopped", 1, **settings), write_run_with_images(place / "full", 2, **settings)


def build_small_survey(place: Path, **settings: Any) -> tuple[Path, Survey]:
    """Build a survey of two runs, with 2 pairs about likeness and 6 about the description."""
    output = place / "survey"
    config = SurveyBuildConfig(output_dir=str(output), **{"control_every": 3, "generate": False, **settings})
    return output, build_survey(write_rival_runs(place), config)


def _write_image(path: Path, generator: np.random.Generator, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, compress_level=1)
