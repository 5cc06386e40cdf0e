"""Sample images in the loop and after each epoch, and generators of the script's own."""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from tiny import Denoiser, add_noise, load_images, parse_arguments, save, seed_everything
from torch.nn import functional


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(cpu=True)
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, load_images(args))
    generator = torch.Generator().manual_seed(3)
    global_step, samples, validated_epochs = 0, [], []

    def log_validation() -> None:
        model.eval()
        with torch.no_grad():
            samples.append(model(torch.randn(1, 4, generator=generator), torch.ones(1, 1)))
        model.train()

    for epoch in range(args.num_train_epochs):
        for step, batch in enumerate(train_dataloader, start=1):
            with accelerator.accumulate(model):
                noise = torch.randn(batch["pixels"].shape, generator=generator)
                timesteps = (torch.rand(size=(len(noise),)) * 1000).long()
                noisy, level = add_noise(batch["pixels"], noise, timesteps)
                loss = functional.mse_loss(model(noisy, level), noise)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            global_step += 1
            if global_step % 4 == 0 and step:
                log_validation()
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
        log_validation()
        validated_epochs.append(epoch)
    save(accelerator, args.output_dir, samples=samples, epochs=validated_epochs, generator=generator.get_state())


if __name__ == "__main__":
    main(parse_arguments())
