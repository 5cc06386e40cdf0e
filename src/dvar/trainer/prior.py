"""Class pictures for prior preservation: those that were given, or those that the base model draws."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dvar.config import CustomDiffusionConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.randomness import seed_for
from dvar.diffusion.sampling import sample_into
from dvar.trainer.concept import CLASS_PICTURES, Concept


def class_prompt(config: CustomDiffusionConfig) -> str:
    """Return the caption of every class picture, and the prompt by which the base model draws them."""
    return f"photo of a {config.class_noun}"


def class_pictures(config: CustomDiffusionConfig, concept: Concept, backbone: Backbone) -> tuple[Image.Image, ...]:
    """Return pictures of the class, RGB squares of the run's resolution; none when the prior has no weight.

    Where none were given, ``backbone`` draws ``num_class_images`` of them, each by its own key, into the run's folder;
    those that are there already are read back.  It must be the base model, still untouched.

    Source: Section 4.1, Custom Diffusion with its official settings: a prior with weight 1, and 200 class pictures.
    Deviates: the released code retrieves photographs from a service that is gone.
    """
    if not config.prior_loss_weight or concept.class_pictures:
        return concept.class_pictures
    folder = Path(config.output_dir).expanduser() / CLASS_PICTURES
    drawn = sample_into(
        folder,
        backbone,
        [class_prompt(config)] * config.num_class_images,
        [seed_for(config.seed, "class", 0, index) for index in range(config.num_class_images)],
        size=config.resolution,
        steps=config.num_inference_steps,
        guidance=config.guidance_scale,
    )
    return tuple(Image.open(path).convert("RGB") for path in drawn)
