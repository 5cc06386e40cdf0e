"""Pictures from a model, drawn by the stock diffusers pipeline, so that what is seen here is what others will get."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dvar.config.training import Sampler
from dvar.diffusion.backbone import Backbone
from dvar.stopping.probe import undisturbed

BATCH = 8


class Abandoned(Exception):
    """Drawing was asked to end before its pictures were done."""


def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int = 50,
    guidance: float = 7.5,
    scheduler: Sampler = "model",
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """Return one RGB picture of ``size`` pixels a side for each prompt, its noise drawn on the CPU from its own seed.

    ``steps`` of ``scheduler``, by default the model's own, under classifier-free guidance of weight ``guidance`` (1 or
    less: none).  A stock pipeline of the same model and scheduler draws the same picture from
    ``generator=torch.Generator().manual_seed(seed)``.
    Neither a train or eval flag nor a global random state is changed.  ``interrupted`` is asked after each step.

    Raises: Abandoned when it says so.

    Source: Section 4.1 and the released command lines: 50 steps, guidance 7.5 for Textual Inversion.
    """

    def look(pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        if interrupted():
            raise Abandoned
        return {}

    pipeline = backbone.pipeline(scheduler)
    pictures: list[Image.Image] = []
    with undisturbed(backbone.modules), backbone.autocast():
        for first in range(0, len(prompts), BATCH):
            drawn = pipeline(
                list(prompts[first : first + BATCH]),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[first : first + BATCH]],
                height=size,
                width=size,
                num_inference_steps=steps,
                guidance_scale=guidance,
                callback_on_step_end=look,
            )
            pictures += drawn.images
    return pictures


def sample_into(
    folder: Path, backbone: Backbone, prompts: Sequence[str], seeds: Sequence[int], **how: Any
) -> list[Path]:
    """Return the pictures of ``folder`` in the order of ``prompts``, drawn by `sample` unless the folder is there.

    They are drawn into a folder beside it and one rename puts that in its place, so that it holds all of them or is
    not there; ``how`` goes to `sample`.

    Raises: Abandoned, as `sample`.
    """
    if not folder.exists():
        staged = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        digits = max(2, len(str(len(prompts) - 1)))
        for index, picture in enumerate(sample(backbone, prompts, seeds, **how)):
            picture.save(staged / f"{index:0{digits}d}.png")
        staged.replace(folder)
    return sorted(folder.glob("*.png"))
