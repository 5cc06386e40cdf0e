"""Runs and surveys made without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from fake_run import fake_trace, write_run
from PIL import Image

from dvar.runs.generate import GENERATED, LIST, _result
from dvar.runs.run_folder import RunFolder
from dvar.survey.build import build
from dvar.survey.config import SurveyBuildConfig
from dvar.survey.survey import Survey

SCENES = ("on the beach", "<script>alert('x')</script>", "at night")


def drawn_run(folder: Path, seed: int, *, side: int = 64, scenes: tuple[str, ...] = SCENES, **settings: Any) -> Path:
    """A finished run with two sample pictures and two pictures of each scene; ``seed`` decides what they look like."""
    trace = fake_trace(steps=8)
    write_run(folder, trace, sampled_every=0, pictures=settings.pop("references", 4), **settings)
    random = np.random.default_rng(seed)
    last = folder / "samples" / f"step-{trace.last_step:06d}"
    for number in range(2):
        _picture(last / f"{number:02d}.png", random, side)
    prompts = [{"prompt": "a photo of <thing>", "seed": number} for number in range(2)]
    (folder / "samples" / "prompts.json").write_text(json.dumps(prompts))
    run = RunFolder.open(folder)
    way = {"num_inference_steps": run.settings.num_inference_steps, "guidance_scale": run.settings.guidance_scale}
    rows = []
    for number, (scene, at) in enumerate((scene, at) for scene in scenes for at in range(2)):
        _picture(folder / GENERATED / f"{number:02d}.png", random, side)
        row = {"path": f"{number:02d}.png", "prompt": f"a photo of <thing> {scene}", "seed": at, "result": _result(run)}
        rows.append(json.dumps({**row, **way}))
    if rows:
        (folder / GENERATED / LIST).write_text("\n".join(rows) + "\n")
    return folder


def rival_runs(place: Path, **settings: Any) -> tuple[Path, Path]:
    """Two runs of one concept and one method."""
    return drawn_run(place / "stopped", 1, **settings), drawn_run(place / "full", 2, **settings)


def small_survey(place: Path, **settings: Any) -> tuple[Path, Survey]:
    """The folder of a survey of two runs, and the survey: 2 pairs about likeness, 6 about the description."""
    output = place / "survey"
    given = {"control_every": 3, "draw": False, **settings}
    return output, build(rival_runs(place), SurveyBuildConfig(output_dir=str(output), **given))


def _picture(path: Path, random: np.random.Generator, side: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(path, compress_level=1)
