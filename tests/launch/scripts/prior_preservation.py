"""Class images beside the instance images in a batch, and a weighted loss on them."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from tiny import Batch, Denoiser, Images, add_noise, parse_arguments, save, seed_everything
from torch.nn import functional
from torch.utils.data import DataLoader


def collate_with_class_images(examples: list[Batch]) -> Batch:
    instances = [example["pixels"] for example in examples]
    return {"pixels": torch.stack(instances + [-instance for instance in instances])}


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(cpu=True)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_dataloader = DataLoader(
        Images(args.samples), batch_size=args.train_batch_size, shuffle=True, collate_fn=collate_with_class_images
    )
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
    global_step = 0
    prior_losses = []
    while global_step < args.max_train_steps:
        for batch in train_dataloader:
            with accelerator.accumulate(model):
                noise = torch.randn_like(batch["pixels"])
                noisy, level = add_noise(batch["pixels"], noise, torch.randint(0, 1000, (len(noise),)))
                prediction, prior_prediction = torch.chunk(model(noisy, level), 2)
                target, prior_target = torch.chunk(noise, 2)
                loss = functional.mse_loss(prediction, target)
                prior_loss = functional.mse_loss(prior_prediction, prior_target)
                loss = loss + args.prior_loss_weight * prior_loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                prior_losses.append(prior_loss.item())
            global_step += 1
            if global_step >= args.max_train_steps:
                break
    save(accelerator, args.output_dir, prior_losses=prior_losses, weight=args.prior_loss_weight)


if __name__ == "__main__":
    main(parse_arguments())
