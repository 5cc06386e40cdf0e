"""What the scripts of this folder share: a tiny network, its loss, and the state that they leave."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]


def parse_arguments() -> argparse.Namespace:
    """Return the arguments of a script, with the names that diffusers' scripts have."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", required=True)
    for name, default in (("max_train_steps", 24), ("num_train_epochs", 100), ("train_batch_size", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("samples", 10), ("gradient_accumulation_steps", 1), ("num_workers", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--checkpointing_steps", type=int)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--prior_loss_weight", type=float, default=1.0)
    parser.add_argument("--report_to")
    return parser.parse_args()


def seed_everything(seed: int = 0) -> None:
    """Seed the global generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Images(Dataset[Batch]):
    """Images that are augmented when they are read, with the generators of the process."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 4, generator=torch.Generator().manual_seed(7))
        self.reads = 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Batch:
        self.reads += 1  # a dataset may change itself when it is read
        flip = -1 if random.random() < 0.5 else 1
        return {"pixels": self.images[index] * flip + 0.01 * torch.randn(4), "index": torch.tensor(index)}


def collate(examples: list[Batch]) -> Batch:
    """Return a batch of examples."""
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def load_images(args: argparse.Namespace, shuffle: bool = True) -> DataLoader[Batch]:
    """Return the training dataloader."""
    return DataLoader(
        Images(args.samples),
        batch_size=args.train_batch_size,
        shuffle=shuffle,
        collate_fn=collate,
        num_workers=args.num_workers,
    )


class Denoiser(nn.Module):
    """A network with dropout, so that the train flag matters."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.1), nn.SiLU(), nn.Linear(16, 4))

    def forward(self, noisy: Tensor, level: Tensor) -> Tensor:
        output: Tensor = self.layers(torch.cat([noisy, level], dim=1))
        return output


def add_noise(pixels: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return noisy images and their noise level."""
    level = (timesteps.float() / 1000)[:, None]
    return (1 - level) * pixels + level * noise, level


def compute_loss(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the mean loss of a batch, with noise and timesteps drawn from the global generator."""
    noise = torch.randn_like(pixels)
    timesteps = torch.randint(0, 1000, (len(pixels),)).long()
    return functional.mse_loss(model(*add_noise(pixels, noise, timesteps)).float(), noise.float())


def save(accelerator: Accelerator, output_dir: str, **rest: Any) -> None:
    """Save weights, optimizer, generators and whatever else training changes."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "models": [accelerator.unwrap_model(model).state_dict() for model in accelerator._models],
        "flags": [[part.training for part in model.modules()] for model in accelerator._models],
        "optimizers": [optimizer.state_dict() for optimizer in accelerator._optimizers],
        "schedulers": [scheduler.state_dict() for scheduler in accelerator._schedulers],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=True)[1],  # type: ignore[index]
        "accelerate": (accelerator.step, accelerator.gradient_state.sync_gradients),
        **rest,
    }
    torch.save(state, folder / f"final-{accelerator.process_index}.pt")
