"""Two trained networks, one of them in training mode without being prepared, and gradients read after backward."""

from __future__ import annotations

import argparse
import itertools

import torch
from accelerate import Accelerator
from tiny import Denoiser, compute_loss, load_images, parse_arguments, save, seed_everything
from torch import nn
from tqdm.auto import tqdm


def main(args: argparse.Namespace) -> None:
    seed_everything()
    accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True)
    model, text_encoder = Denoiser(), nn.Sequential(nn.Embedding(12, 4), nn.Dropout(0.2))
    unprepared = nn.Dropout(0.3)
    parameters = itertools.chain(model.parameters(), text_encoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    model, text_encoder, optimizer, train_dataloader = accelerator.prepare(
        model, text_encoder, optimizer, load_images(args)
    )
    global_step = 0
    for _epoch in range(args.num_train_epochs):
        for _step, batch in enumerate(tqdm(train_dataloader, disable=True)):
            with accelerator.accumulate(model, text_encoder):
                prompt = unprepared(text_encoder(batch["index"]))
                loss = compute_loss(model, batch["pixels"] + prompt)
                accelerator.backward(loss)
                # As Custom Diffusion: only the second half of the embeddings is trained.
                grads = text_encoder[0].weight.grad
                grads[:6] = 0
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                global_step += 1
            if global_step >= args.max_train_steps:
                break
        if global_step >= args.max_train_steps:
            break
    assert unprepared.training
    save(accelerator, args.output_dir, global_step=global_step)


if __name__ == "__main__":
    main(parse_arguments())
