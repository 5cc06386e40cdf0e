"""Class images for prior preservation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.randomness import seed_for
from dvar.diffusion.sampling import sample_into
from dvar.files import regular_file
from dvar.training.dataset import ClassImages
from dvar.training.processes import ALONE, Processes
from dvar.training.run_layout import class_images_name
from dvar.training.sharding import sampler_of


def generate_class_images(
    config: TrainingConfig, classes: Sequence[ClassImages], backbone: Backbone, processes: Processes = ALONE
) -> Iterator[ClassImages]:
    """Yield ``classes``, each with images; missing ones are generated into the run's folder, unless it has them.

    Args:
        config: The config of the run.
        classes: The classes of its concepts.
        backbone: The base model, untrained.
        processes: The processes of the run.

    Source: Section 4.1, Custom Diffusion with its official settings: a prior with weight 1, and 200 class images.
    Deviates: The released code retrieves photographs from a service that no longer exists.
    """
    folder = Path(config.output_dir).expanduser()
    for number, class_images in enumerate(classes):
        if class_images.images:
            yield class_images
            continue
        paths = sample_into(
            folder / class_images_name(number),
            backbone,
            [class_images.prompt] * config.num_class_images,
            [seed_for(config.seed, "class", number, index) for index in range(config.num_class_images)],
            sampler=sampler_of(processes),
            size=config.resolution,
            steps=config.num_inference_steps,
            guidance=config.guidance_scale,
            scheduler=config.validation_scheduler,
        )
        yield replace(class_images, images=tuple(Image.open(regular_file(path)).convert("RGB") for path in paths))
