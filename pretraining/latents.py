"""Stage 3: pictures once drawn and encoded, for the U-Net to see several times under other captions and other noise.

``work/latents/NNNN.safetensors`` holds 4,096 pictures: ``moments`` float16 [n, 16, 16, 16] (mean and log-variance),
``facts`` int16 [n, 15], ``masks`` uint8 [n, 16, 16] (the subject's share of each latent cell).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pretraining.autoencoder import build
from pretraining.pictures import as_tensor, captions_for, draw_pictures
from pretraining.training import WORK, arguments, load_average, processes, rank

SHARD, BATCH = 4096, 64

EMPTY = 0.1
"""Share of captions that are empty, for guidance."""


@dataclass(frozen=True)
class Examples:
    """A batch for a base model: scaled latents and noise [n, c, h, w], the weight of each cell [n, 1, h, w], captions,
    and what draws the rest."""

    latents: Tensor
    noise: Tensor
    region: Tensor
    captions: list[str]
    generator: torch.Generator


def load_latents() -> dict[str, Tensor]:
    shards = [load_file(path) for path in sorted((WORK / "latents").glob("*.safetensors"))]
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def scaling_factor(moments: Tensor) -> float:
    """What brings the latents' standard deviation to 1; rounded, for it goes into a config."""
    mean, logvar = moments[:4096].float().chunk(2, dim=1)
    return round(float(1 / (mean.var() + logvar.exp().mean()).sqrt()), 5)


def draw_examples(data: dict[str, Tensor], scale: float, count: int, rng: np.random.Generator) -> Examples:
    """Draw ``count`` encoded images with captions; the subject's cells weigh threefold."""
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    picked = torch.from_numpy(rng.integers(len(data["moments"]), size=count))
    captions, _ = captions_for(data["facts"][picked].numpy(), rng)
    captions = ["" if rng.uniform() < EMPTY else caption for caption in captions]
    mean, logvar = data["moments"][picked].float().chunk(2, dim=1)
    latents = scale * (mean + (logvar / 2).exp() * torch.randn(mean.shape, generator=generator))
    noise = torch.randn(mean.shape, generator=generator)
    region = 1 + 2 * data["masks"][picked][:, None].float() / 255
    return Examples(latents, noise, region, captions, generator)


def main() -> None:
    chosen = arguments(steps=24, batch=BATCH)
    vae = load_average("autoencoder", build()).to(chosen.device, memory_format=torch.channels_last)
    folder = WORK / "latents"
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(rank(), chosen.steps, processes()):
        path = folder / f"{shard:04d}.safetensors"
        if path.exists():
            continue
        moments, truths, masks = [], [], []
        for index in range(SHARD // BATCH):
            pictures = draw_pictures(4000 + chosen.seed, shard * (SHARD // BATCH) + index, BATCH)
            with torch.no_grad(), torch.autocast(chosen.device, torch.bfloat16):
                posterior = vae.encode(as_tensor(pictures.pixels, chosen.device)).latent_dist
            moments.append(posterior.parameters.half().cpu())
            truths.append(torch.from_numpy(pictures.facts))
            masks.append((F.avg_pool2d(torch.from_numpy(pictures.masks()), 4) * 255).to(torch.uint8))
        save_file(
            {"moments": torch.cat(moments).contiguous(), "facts": torch.cat(truths), "masks": torch.cat(masks)},
            path.with_suffix(".part"),
        )
        os.replace(path.with_suffix(".part"), path)
        print(path.name, flush=True)


if __name__ == "__main__":
    main()
