"""Class pictures for prior preservation: those that were given, or those that the base model draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from dvar.config.training import AnyConfig, TextualInversionConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.randomness import seed_for
from dvar.diffusion.sampling import sample_into
from dvar.training.dataset import ClassImages
from dvar.training.run_layout import CLASS_PICTURES


def with_pictures(config: AnyConfig, classes: Sequence[ClassImages], backbone: Backbone) -> Iterator[ClassImages]:
    """Yield ``classes``, each with pictures, RGB squares of the run's resolution.

    Where none were given, ``backbone`` draws ``num_class_images`` of them from the class's prompt, each by its own
    key, into the run's folder; those that are there already are read back.  It must be the base model, still
    untouched.

    Source: Section 4.1, Custom Diffusion with its official settings: a prior with weight 1, and 200 class pictures.
    Deviates: the released code retrieves photographs from a service that is gone.
    """
    folder = Path(config.output_dir).expanduser()
    for number, known in enumerate(classes):
        if known.pictures or isinstance(config, TextualInversionConfig):  # which has no classes
            yield known
            continue
        drawn = sample_into(
            folder / (f"{CLASS_PICTURES}_{number + 1}" if number else CLASS_PICTURES),
            backbone,
            [known.prompt] * config.num_class_images,
            [seed_for(config.seed, "class", number, index) for index in range(config.num_class_images)],
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            scheduler=config.validation_scheduler,
        )
        yield replace(known, pictures=tuple(Image.open(path).convert("RGB") for path in drawn))
