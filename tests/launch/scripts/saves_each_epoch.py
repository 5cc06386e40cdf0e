"""Weights that are saved at the end of each epoch and nowhere else, beside a mean over the epoch."""

from __future__ import annotations

import argparse
import math

import torch
from accelerate import Accelerator
from tiny import Denoiser, compute_loss, load_images, parse_arguments, save, seed_everything


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(cpu=True)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, load_images(args))
    global_step, means = 0, []
    for epoch in range(math.ceil(args.max_train_steps / len(train_dataloader))):
        losses = []
        for batch in train_dataloader:
            loss = compute_loss(model, batch["pixels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            global_step += 1
            if global_step >= args.max_train_steps:
                break
        means.append(sum(losses) / len(losses))
        save(accelerator, args.output_dir, means=means, epoch=epoch, global_step=global_step)


if __name__ == "__main__":
    main(parse_arguments())
