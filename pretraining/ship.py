"""Stage 6: what the stages made, as one folder in the formats of diffusers and transformers, in float16.

``python -m pretraining.ship FOLDER`` writes the pipeline; ``--judges FOLDER`` the scoring CLIP and the recogniser.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel

from pretraining import autoencoder, clip, unet
from pretraining.training import load_average
from pretraining.words import build_tokenizer


def pipeline() -> StableDiffusionPipeline:
    tokenizer = build_tokenizer()
    whole = clip.load("clip", len(tokenizer))
    text_encoder = CLIPTextModel(whole.config.text_config)
    text_encoder.load_state_dict(whole.text_model.state_dict())
    vae = load_average("autoencoder", autoencoder.build())
    vae.register_to_config(scaling_factor=unet.scaling_factor(unet.load_latents()["moments"]))
    # SD1.5 ships PNDM, which its users know; training builds DDPM from the same config.
    scheduler = PNDMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=load_average("unet", unet.build()),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    chosen = parser.parse_args()
    pipeline().to(dtype=torch.float16).save_pretrained(chosen.folder)


if __name__ == "__main__":
    main()
