"""Latents cached batch by batch before training, and read at the position of the batch."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from tiny import Denoiser, compute_loss, load_images, parse_arguments, save, seed_everything

args = parse_arguments()
seed_everything()
accelerator = Accelerator(cpu=True)
model = Denoiser()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
train_dataloader = load_images(args, shuffle=False)
latents_cache = [(batch["pixels"], batch["index"]) for batch in train_dataloader]
model, optimizer, train_dataloader = accelerator.prepare(model, optimizer, train_dataloader)
global_step = 0
for _epoch in range(args.num_train_epochs):
    for step, batch in enumerate(train_dataloader):
        with accelerator.accumulate(model):
            latents, indices = latents_cache[step]
            assert torch.equal(indices, batch["index"])
            loss = compute_loss(model, latents)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        global_step += 1
        if global_step >= args.max_train_steps:
            break
    if global_step >= args.max_train_steps:
        break
save(accelerator, args.output_dir, global_step=global_step)
