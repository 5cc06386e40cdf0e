"""Checkpoints by accelerate, and a resume that skips the batches of the epoch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from tiny import Denoiser, compute_loss, load_images, parse_arguments, save, seed_everything


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=args.output_dir))
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, load_images(args))
    updates_per_epoch = math.ceil(len(train_dataloader) / args.gradient_accumulation_steps)
    global_step, first_epoch, resume_step = 0, 0, 0
    if args.resume_from_checkpoint:
        accelerator.load_state(args.resume_from_checkpoint)
        global_step = int(Path(args.resume_from_checkpoint).name.split("-")[1])
        first_epoch, resume_step = divmod(global_step, updates_per_epoch)
    for epoch in range(first_epoch, args.num_train_epochs):
        for step, batch in enumerate(train_dataloader):
            if args.resume_from_checkpoint and epoch == first_epoch and step < resume_step:
                continue
            with accelerator.accumulate(model):
                loss = compute_loss(model, batch["pixels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            global_step += 1
            if args.checkpointing_steps and global_step % args.checkpointing_steps == 0:
                accelerator.save_state(str(Path(args.output_dir) / f"checkpoint-{global_step}"))
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
    save(accelerator, args.output_dir, global_step=global_step)


if __name__ == "__main__":
    main(parse_arguments())
