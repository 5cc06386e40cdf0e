"""The plain structure: epochs, batches, accumulate, backward, clip, step, schedule, log."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from tiny import Denoiser, compute_loss, load_images, parse_arguments, save, seed_everything


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        cpu=True,
        log_with=args.report_to,
        project_dir=args.output_dir,
    )
    model = Denoiser()
    train_dataloader = load_images(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    if args.report_to:
        accelerator.init_trackers("plain")
    losses = []
    global_step = 0
    for _epoch in range(args.num_train_epochs):
        model.train()
        train_loss = 0.0
        for _step, batch in enumerate(train_dataloader):
            with accelerator.accumulate(model):
                loss = compute_loss(model, batch["pixels"])
                avg_loss = accelerator.gather(loss.repeat(args.train_batch_size)).mean()
                train_loss += avg_loss.item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
                losses.append(train_loss)
                accelerator.log({"train_loss": train_loss}, step=global_step)
                train_loss = 0.0
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
    accelerator.wait_for_everyone()
    reads = train_dataloader.dataset.reads
    save(accelerator, args.output_dir, losses=losses, global_step=global_step, reads=reads)
    accelerator.end_training()


if __name__ == "__main__":
    main(parse_arguments())
