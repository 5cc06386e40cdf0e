"""Images generated with a run's weights: those of its last samples and those generated afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from dvar.config.training import Sampler, TrainingConfig
from dvar.errors import RefusedInput
from dvar.files import parse_json, read_text, writing_problem
from dvar.runs.run_folder import RunFolder
from dvar.schema import find_mismatch
from dvar.training.run_layout import GENERATED, GENERATED_LIST

if TYPE_CHECKING:
    from PIL import Image

    from dvar.diffusion.backbone import Backbone


_ROW = {
    "path": str,
    "prompt": str,
    "seed": int,
    "num_inference_steps": int,
    "guidance_scale": float,
    "result": str,
    "scheduler?": str,
}


@dataclass(frozen=True)
class GeneratedImage:
    """An image and what it was generated from; equal prompts, seeds and sampling settings start from equal noise.

    Attributes:
        path: The image.
        prompt: The prompt.
        seed: The seed of its initial noise.
        num_inference_steps: Denoising steps.
        guidance_scale: Scale of classifier-free guidance.
        result: `hash_result` of the run at that time, so that images of an earlier training in the same folder are
            recognised; empty for a sample image.
        scheduler: The scheduler.
    """

    path: Path
    prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    result: str = ""
    scheduler: Sampler = "model"

    @property
    def sampling_settings(self) -> tuple[int, float, Sampler]:
        """Steps, guidance and scheduler."""
        return self.num_inference_steps, self.guidance_scale, self.scheduler


def list_generated_images(run: RunFolder) -> tuple[GeneratedImage, ...]:
    """Return the images of a run's exported weights: its last samples, then those of `generate_images` in its folder.

    Raises:
        RefusedInput: The list of generated images is damaged.
    """
    images, path = _list_samples(run), run.folder / GENERATED / GENERATED_LIST
    if path.exists():
        try:
            rows = [parse_json(line) for line in read_text(path).split("\n") if line]  # a prompt may hold other breaks
            if mismatch := find_mismatch(rows, [_ROW], "line"):
                raise ValueError(mismatch)
            listed = [GeneratedImage(**{**row, "path": path.parent / Path(row["path"]).name}) for row in rows]
        except (OSError, ValueError, TypeError) as error:
            raise RefusedInput([f"{path} is damaged ({error}): delete it and generate the images again"]) from error
        images += [image for image in listed if image.result == hash_result(run)]
    return tuple(images)


def generate_images(
    run: RunFolder,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    folder: Path | None = None,
    guidance_scale: float | None = None,
    num_inference_steps: int | None = None,
    scheduler: Sampler | None = None,
    mixed_precision: str | None = None,
    quantize: str | None = None,
    offload: bool | None = None,
) -> tuple[GeneratedImage, ...]:
    """Generate one image for each prompt and seed with the model of a finished run, and list them beside the images.

    Args:
        run: The finished run.
        prompts: One prompt for each image.
        seeds: One seed for each image.
        folder: Where the images go, beside those that are there already; ``generated`` in the run's folder by default.
        guidance_scale: Scale of classifier-free guidance; the run's own by default.
        num_inference_steps: Denoising steps; the run's own by default.
        scheduler: The scheduler; the run's own by default.
        mixed_precision: The arithmetic of the model; the run's own by default.
        quantize: The bits of its denoising network; the run's own by default.
        offload: Whether networks are on the CPU while they are idle; the run's own choice by default.

    Raises:
        RefusedInput: The run has not finished, its model cannot be quantised here, or the folder cannot be written.
        ModelError: Its base model cannot be loaded.
    """
    from dvar.diffusion.devices import float32_arithmetic
    from dvar.diffusion.sampling import sample
    from dvar.runs.load_model import load_personalised_backbone, loading_options
    from dvar.training.family_fit import sampling_problems

    folder = folder or run.folder / GENERATED
    if problem := writing_problem(folder, folder=True):
        raise RefusedInput([f"images need a folder that can be written, and {problem}: name another"])
    steps = num_inference_steps or run.settings.num_inference_steps
    if problems := sampling_problems(run.settings, steps):
        raise RefusedInput(problems)
    options = loading_options(run.settings, mixed_precision, quantize, offload)
    backbone: Backbone = load_personalised_backbone(run.folder, **options)
    guidance = float(run.settings.guidance_scale if guidance_scale is None else guidance_scale)
    scheduler = scheduler or run.settings.validation_scheduler
    with float32_arithmetic(run.settings.allow_tf32):
        samples = sample(
            backbone, prompts, seeds, size=run.settings.resolution, steps=steps, guidance=guidance, scheduler=scheduler
        )
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for sample_image, prompt, seed in zip(samples, prompts, seeds, strict=True):
        path = _save_new(sample_image, folder)
        images.append(GeneratedImage(path, prompt, seed, steps, guidance, hash_result(run), scheduler))
    with (folder / GENERATED_LIST).open("a", encoding="utf-8") as file:
        for image in images:
            file.write(json.dumps({**vars(image), "path": image.path.name}, ensure_ascii=False) + "\n")
    return tuple(images)


def _save_new(image: Image.Image, folder: Path) -> Path:
    """Save an image under the first number that is free, also of other processes, and return its path."""
    for number in count():
        with suppress(FileExistsError), (path := folder / f"{number:02d}.png").open("xb") as file:
            try:
                image.save(file, "png")
            except BaseException:  # a part of an image, as on a full disk
                path.unlink()
                raise
            return path
    raise AssertionError("numbers do not end")


def find_missing_word(config: TrainingConfig, prompt: str) -> str:
    """Return that ``prompt`` has none of the words that a run of ``config`` learned; empty where it has one."""
    words = config.placeholder_tokens
    if not words or any(word in prompt for word in words):
        return ""
    remedy = f"put it in, as in {config.plain_prompt!r}"
    return f"the prompt has no {' or '.join(words)}, by which this run's concept is called: {remedy}"


def hash_result(run: RunFolder) -> str:
    """Return a digest of the run's result.json, which differs for each training."""
    return sha256(json.dumps(run.result, sort_keys=True).encode()).hexdigest()[:16]


def _list_samples(run: RunFolder) -> list[GeneratedImage]:
    """Return the sample images of the exported step."""
    paths = run.samples.get(run.exported_step, ()) if run.exported_step is not None else ()
    config = run.settings
    steps, guidance, scheduler = config.num_inference_steps, float(config.guidance_scale), config.validation_scheduler
    return [
        GeneratedImage(path, str(item["prompt"]), int(item["seed"]), steps, guidance, scheduler=scheduler)
        for path, item in zip(paths, run.prompts, strict=False)
    ]
