"""Generated images, by the stock diffusers pipeline: what is seen here is what others will get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dvar.config.training import Sampler
from dvar.diffusion.backbone import Backbone
from dvar.files import staged_folder
from dvar.stopping.probe import preserve_state

BATCH, PIXELS = 8, 2**20
"""Images in one forward pass at most, and their pixels: a decoder in float32 takes some 3 KiB for each."""


class Abandoned(Exception):
    """Work was interrupted before it was complete."""


def sample(
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    size: int,
    steps: int = 50,
    guidance: float = 7.5,
    scheduler: Sampler = "model",
    negatives: Sequence[str | None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[Image.Image]:
    """Return one generated RGB image for each prompt, its noise drawn on the CPU from its own seed.

    A stock pipeline of the same model and scheduler generates the same image from
    ``generator=torch.Generator().manual_seed(seed)``. Neither a train or eval flag nor a global random state changes.

    Args:
        backbone: The model.
        prompts: The prompts.
        seeds: The seed of each image.
        size: The side of the images, in pixels.
        steps: Denoising steps.
        guidance: Weight of guidance, as the stock pipeline counts it; as a rule there is none with 1 or less.
        scheduler: The scheduler, by default the model's own.
        negatives: What guidance leads away from, for each prompt; where there is none, what the stock pipeline takes.
        interrupted: Whether to stop; asked after each denoising step.

    Raises:
        Abandoned: ``interrupted`` returned True.

    Source: Section 4.1 and the released command lines: 50 steps, guidance 7.5 for Textual Inversion.
    """

    def check_interrupted(pipeline: Any, step: int, timestep: Any, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
        if interrupted():
            raise Abandoned
        return {}

    negatives = negatives or [None] * len(prompts)
    pipeline = backbone.pipeline(scheduler)
    images: list[Image.Image] = []
    decoding = _decoding_in_float32(pipeline, backbone.device.type)
    with preserve_state(backbone.modules), backbone.autocast(), backbone.generating(pipeline), decoding:
        for part in _iter_batches(negatives, size):
            output = pipeline(
                **_options(backbone, prompts[part], negatives[part], guidance),
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                height=size,
                width=size,
                num_inference_steps=steps,
                callback_on_step_end=check_interrupted,
            )
            images += output.images if isinstance(output.images, list) else to_images(output.images)
    return images


@contextmanager
def _decoding_in_float32(pipeline: Any, device: str) -> Iterator[None]:
    """Decode latents in float32 in a scope, whatever the arithmetic of the networks: half precision leaves bands."""
    autoencoder = getattr(pipeline, "vae", None) or pipeline.vqvae
    decode = autoencoder.decode

    def decode_in_float32(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return decode(latents.float(), *arguments, **options)

    autoencoder.decode = decode_in_float32
    try:
        yield
    finally:
        del autoencoder.decode


def rehearse(
    backbone: Backbone,
    prompts: Sequence[str],
    *,
    size: int,
    guidance: float,
    negatives: Sequence[str | None] | None = None,
) -> None:
    """Have the stock pipeline read these prompts in batches as `sample`, each once, and generate nothing."""

    class Rehearsed(Exception):
        """The prompts have been read."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise Rehearsed

    pairs = list(dict.fromkeys(zip(prompts, negatives or [None] * len(prompts), strict=True)))
    prompts, negatives = [prompt for prompt, _ in pairs], [negative for _, negative in pairs]
    with preserve_state(backbone.modules), backbone.autocast():
        for part in _iter_batches(negatives, size):
            pipeline = backbone.pipeline()
            pipeline.prepare_latents = stop  # which every pipeline calls once it has read its prompts
            with suppress(Rehearsed), backbone.generating(pipeline):
                options = _options(backbone, prompts[part], negatives[part], guidance)
                pipeline(**options, height=size, width=size)


def batch_size(size: int) -> int:
    """Return how many images of this side are generated in one forward pass."""
    return max(1, min(BATCH, PIXELS // size**2))


def _iter_batches(negatives: Sequence[str | None], size: int) -> Iterator[slice]:
    """Yield the parts of a list of prompts that are generated in one pass: all with a negative prompt, or all without.

    An empty one would stand for none otherwise, which is not the same to every pipeline.
    """
    first = 0
    for _, same in groupby(negatives, lambda negative: negative is None):
        last = first + len(list(same))
        yield from (slice(start, min(start + batch_size(size), last)) for start in range(first, last, batch_size(size)))
        first = last


def _options(
    backbone: Backbone, prompts: Sequence[str], negatives: Sequence[str | None], guidance: float
) -> dict[str, Any]:
    """Return the arguments of the stock pipeline for a batch, of which all have a negative prompt or none."""
    texts = [negative for negative in negatives if negative is not None]
    return backbone.generation_options(prompts, guidance, texts or None)


def to_images(pixels: torch.Tensor) -> list[Image.Image]:
    """Return RGB images of pixels [B, 3, H, W] in [0, 1], as diffusers rounds them."""
    values = (255 * pixels.float().cpu().permute(0, 2, 3, 1)).round().to(torch.uint8).numpy()
    return [Image.fromarray(image) for image in values]


def sample_into(
    folder: Path,
    backbone: Backbone,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    sampler: Callable[..., list[Image.Image]] = sample,
    **options: Any,
) -> list[Path]:
    """Return the paths of the images of ``folder`` in the order of ``prompts``, generated unless the folder exists.

    The folder holds all of the images or does not exist.

    Args:
        folder: The folder.
        backbone: The model.
        prompts: The prompts.
        seeds: The seed of each image.
        sampler: Generates the images, as `sample` does.
        options: Further arguments of `sample`.

    Raises:
        Abandoned: As `sample`.
    """
    if not folder.exists():
        digits = max(2, len(str(len(prompts) - 1)))
        with staged_folder(folder) as staged:
            for index, image in enumerate(sampler(backbone, prompts, seeds, **options)):
                image.save(staged / f"{index:0{digits}d}.png")
    return sorted(folder.glob("*.png"))
