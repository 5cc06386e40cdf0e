"""Likeness and obedience of a run's sample images, by a CLIP, measured in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.errors import RefusedInput
from dvar.files import read_json, regular_file, write_json
from dvar.runs.run_folder import RunFolder
from dvar.studio.run_files import SCORES

_SCHEMA = {"clip": str, "steps": {str: {"likeness": float, "obedience": float}}}


@dataclass(frozen=True)
class StepScores:
    """The scores of the samples of one step, as mean cosines: with the instance images, and with their prompts."""

    likeness: float
    obedience: float


@dataclass(frozen=True)
class RunScores:
    """The scores of a run.

    Attributes:
        clip: The CLIP that measured them.
        steps: Step to its scores.
    """

    clip: str
    steps: Mapping[int, StepScores]


def read_scores(run: RunFolder) -> RunScores | None:
    """Return the scores that were measured of a run; None where there are none."""
    try:
        content = read_json(run.folder / SCORES, _SCHEMA)
        steps = {int(step): StepScores(**scores) for step, scores in content["steps"].items()}
    except (OSError, ValueError, TypeError):
        return None
    return RunScores(content["clip"], steps)


def find_clip(config: TrainingConfig) -> str:
    """Return the name of the CLIP that is at hand for a run; an empty text where there is none."""
    return "the bundled scorer" if config.pretrained_model_name_or_path in BUNDLED_MODELS else config.clip_model or ""


def measure_scores(run: RunFolder) -> RunScores:
    """Measure the samples of the steps that have no scores yet, and write all scores into the run's folder.

    Raises:
        RefusedInput: There is no CLIP at hand.
        ModelError: It cannot be loaded.
    """
    from PIL import Image

    from dvar.diffusion.clip import Clip

    config = run.settings
    if not find_clip(config):
        rule = f"a run of {config.pretrained_model_name_or_path} names no CLIP that could score its samples"
        raise RefusedInput([f"{rule}: train with --clip_model and --best_by clip"])
    bundled = config.pretrained_model_name_or_path in BUNDLED_MODELS
    clip = Clip.scoring() if bundled else Clip.load(Path(str(config.clip_model)).expanduser())

    def embed(paths: tuple[Path, ...]) -> Any:
        return clip.embed_images([Image.open(regular_file(path)) for path in paths])

    before = read_scores(run)
    steps = dict(before.steps) if before and before.clip == clip.name else {}
    references = embed(run.references)
    noun = getattr(config, "class_noun", None) or config.initializer_token or config.kind
    for step, paths in run.samples.items():
        if step in steps or not paths:
            continue
        texts = [str(row["prompt"]).replace(config.subject, noun) for row in run.prompts[: len(paths)]]
        images = embed(paths[: len(texts)])
        obedience = (images * clip.embed_texts(texts)).sum(dim=1).mean()
        steps[step] = StepScores(float((images @ references.T).mean()), float(obedience))
    rows = {str(step): vars(scores) for step, scores in sorted(steps.items())}
    write_json(run.folder / SCORES, {"clip": clip.name, "steps": rows})
    return RunScores(clip.name, steps)


if __name__ == "__main__":
    try:
        measure_scores(RunFolder.open(sys.argv[1]))
    except RefusedInput as error:
        sys.exit(str(error))
