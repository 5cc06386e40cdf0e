"""Stage 3: pictures once drawn and encoded, for the U-Net to see several times under other captions and other noise.

``work/latents/NNNN.safetensors`` holds 4,096 pictures: ``moments`` float16 [n, 16, 16, 16] (mean and log-variance),
``facts`` int16 [n, 15], ``masks`` uint8 [n, 16, 16] (the subject's share of each latent cell).
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from pretraining.autoencoder import build
from pretraining.pictures import as_tensor, draw_pictures
from pretraining.training import WORK, arguments, load_average, processes, rank

SHARD, BATCH = 4096, 64


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
