"""A second dataloader that is read by `next`, and a third one for a validation loss."""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from tiny import Denoiser, Images, collate, compute_loss, load_images, parse_arguments, save, seed_everything
from torch.utils.data import DataLoader


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(cpu=True)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    regular_dataloader = DataLoader(Images(3), batch_size=1, shuffle=True, collate_fn=collate)
    val_dataloader = DataLoader(Images(4), batch_size=2, collate_fn=collate)
    model, optimizer, train_dataloader, val_dataloader = accelerator.prepare(
        model, optimizer, load_images(args), val_dataloader
    )
    regular_batches = iter(itertools.chain.from_iterable(itertools.repeat(regular_dataloader)))
    global_step, seen, validation_losses = 0, [], []
    for _epoch in range(args.num_train_epochs):
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                regular_batch = next(regular_batches)
                loss = compute_loss(model, batch["pixels"]) + compute_loss(model, regular_batch["pixels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                seen.append(regular_batch["index"].tolist())
            global_step += 1
            if global_step % 10 == 0:
                with torch.no_grad():
                    validation_losses += [compute_loss(model, held["pixels"]).item() for held in val_dataloader]
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
    save(accelerator, args.output_dir, validation_losses=validation_losses, seen=seen)


if __name__ == "__main__":
    main(parse_arguments())
