"""A trainer whose loop is in a method of a module beside the script, and which counts steps in a state of its own."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from tiny import Denoiser, compute_loss, load_images


@dataclass
class TrainingState:
    """The progress of training."""

    global_step: int = 0
    epoch: int = 0


class Trainer:
    """A trainer in the style of kohya's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.state = args, TrainingState()
        self.accelerator = Accelerator(gradient_accumulation_steps=args.gradient_accumulation_steps, cpu=True)
        self.model = Denoiser()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def train(self) -> None:
        model, optimizer, dataloader = self.accelerator.prepare(self.model, self.optimizer, load_images(self.args))
        args, skipped_dataloader = self.args, None
        for epoch in range(args.num_train_epochs):
            self.state.epoch = epoch
            for _step, batch in enumerate(skipped_dataloader or dataloader):
                with self.accelerator.accumulate(model):
                    optimizer.zero_grad(set_to_none=True)
                    loss = compute_loss(model, batch["pixels"])
                    self.accelerator.backward(loss)
                    optimizer.step()
                if self.accelerator.sync_gradients:
                    self.state.global_step += 1
                if self.state.global_step >= args.max_train_steps:
                    return
