"""What every stage of the recipe shares: a resumable training state, a learning-rate plan, a log.

A stage's state lies in ``work/<stage>/``: ``state.safetensors`` (weights, their moving average, the optimisers'
moments, the step) written whole or not at all, ``log.jsonl``, ``stage.json`` (seed, steps, a hash of the data,
versions) and, where a stage draws them, ``grids/``.  Batches are keyed by the step, so a killed stage goes on as if it
had not been.

``torchrun --nproc_per_node 2 -m pretraining.<stage> --threads 1`` divides each batch between two processes, whose
gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from pretraining.muon import Muon

WORK = Path(os.environ.get("DVAR_PRETRAINING_WORK", Path(__file__).parent / "work"))
SAVE_EVERY_SECONDS = 120
GRID_EVERY_STEPS = 1000
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
"""What an optimiser may keep of a parameter, by the names in its state."""
ENDS = ("conv_in", "conv_out", "embed")
"""Parts of the names of matrices that Muon leaves to AdamW: the first and last layers, and tables."""
PACKAGES = ("torch", "diffusers", "transformers", "skia-python")


def arguments(steps: int, batch: int, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """Every stage takes these, beside what its own ``parser`` has; ``--steps`` may change between one start and the
    next."""
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="folder under work/, if not the stage's own")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    if chosen.batch % processes():
        raise SystemExit(f"--batch must be a multiple of the number of processes, {processes()}; it is {chosen.batch}")
    return chosen


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(step: int, batch: int) -> tuple[int, int]:
    """Return what keys this process's part of a step's batch, and how many images that is."""
    return step * processes() + rank(), batch // processes()


def together(tensors: list[torch.Tensor], operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Let the processes agree on ``tensors``, in place and in one message."""
    if processes() > 1 and tensors:
        whole = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(whole, operation)
        for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


class Training:
    """Weights, optimiser, moving average and step of one stage."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        chosen: argparse.Namespace,
        *,
        lr: float,
        data: str,
        decay: float = 0.999,
        optimizer: str = "adamw",
        **record: object,
    ) -> None:
        self.folder, self.model, self.steps, self.lr, self.decay = WORK / name, model, chosen.steps, lr, decay
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = {
            "steps": chosen.steps,
            "batch": chosen.batch,
            "seed": chosen.seed,
            "optimizer": optimizer,
            "learning_rate": lr,
            "average": decay,
            "data": data,
            **record,
            "versions": {package: version(package) for package in PACKAGES},
        }
        model.to(chosen.device, memory_format=torch.channels_last)
        self.parameters = {key: p for key, p in model.named_parameters() if p.requires_grad}
        matrices = {key: p for key, p in self.parameters.items() if p.ndim > 1}
        inner = {key for key in matrices if not any(end in key for end in ENDS)} if optimizer == "muon" else set()
        groups = [
            {"params": [p for key, p in matrices.items() if key not in inner], "weight_decay": 0.01},
            {"params": [p for p in self.parameters.values() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)]
        if inner:
            self.optimizers.append(Muon([matrices[key] for key in inner], lr=lr))
        self.average = {key: p.detach().clone() for key, p in self.parameters.items()}
        self.step, self._saved, self._began = 0, time.monotonic(), time.monotonic()
        self._restore()

    def __iter__(self) -> Iterator[int]:
        """The steps still to do; the state is saved on the way and at the end."""
        while self.step < self.steps:
            yield self.step
            if rank() == 0 and time.monotonic() - self._saved > SAVE_EVERY_SECONDS:
                self.save()
        if rank() == 0:
            self.save()

    def update(self, loss: torch.Tensor) -> None:
        """One step: warm-up over 200 steps, constant, then linearly to zero over the last fifth."""
        (loss / processes()).backward()
        together([p.grad for p in self.parameters.values() if p.grad is not None])
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        left = (self.steps - self.step) / max(1.0, 0.2 * self.steps)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr * min(1.0, (self.step + 1) / 200, left)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def log(self, **values: float) -> None:
        """Write a line, of this process's part of the batch where there are several; the first alone does."""
        if rank():
            return
        seconds = round(time.monotonic() - self._began, 1)
        line = json.dumps({"step": self.step, "seconds": seconds, **{k: round(float(v), 5) for k, v in values.items()}})
        with (self.folder / "log.jsonl").open("a") as log:
            log.write(line + "\n")
        print(self.folder.name, line, flush=True)

    def grid(self, rows: list[np.ndarray]) -> None:
        """Keep a sheet of pictures of this step: each row uint8 [n, side, side, 3]."""
        if rank():
            return
        (self.folder / "grids").mkdir(exist_ok=True)
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in rows])
        Image.fromarray(sheet).save(self.folder / "grids" / f"{self.step:06d}.png")

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model be its moving average for a while."""
        current = {key: parameter.data for key, parameter in self.parameters.items()}
        for key, parameter in self.parameters.items():
            parameter.data = self.average[key]
        yield
        for key, parameter in self.parameters.items():
            parameter.data = current[key]

    def save(self) -> None:
        (self.folder / "stage.json").write_text(json.dumps(self.record | {"reached": self.step}, indent=1) + "\n")
        tensors = {"step": torch.tensor(self.step)}
        for key, parameter in self.parameters.items():
            tensors[f"weight.{key}"] = parameter.detach().contiguous()
            tensors[f"average.{key}"] = self.average[key].contiguous()
            held = next((o.state[parameter] for o in self.optimizers if parameter in o.state), {})
            tensors |= {f"{moment}.{key}": held[moment].contiguous() for moment in MOMENTS if moment in held}
        save_file(tensors, self.folder / "state.part")
        os.replace(self.folder / "state.part", self.folder / "state.safetensors")
        self._saved = time.monotonic()

    def _restore(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        tensors = load_file(path)
        self.step = int(tensors["step"])
        for key, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{key}"])
            self.average[key].copy_(tensors[f"average.{key}"])
            held = {moment: tensors[f"{moment}.{key}"] for moment in MOMENTS if f"{moment}.{key}" in tensors}
            if held:
                owner = next(o for o in self.optimizers for g in o.param_groups for p in g["params"] if p is parameter)
                held = {moment: torch.empty_like(parameter).copy_(value) for moment, value in held.items()}
                owner.state[parameter] = {"step": torch.tensor(float(self.step)), **held}


def averages(name: str) -> dict[str, torch.Tensor]:
    """The stage's moving-average weights."""
    tensors = load_file(WORK / name / "state.safetensors")
    return {key.removeprefix("average."): value for key, value in tensors.items() if key.startswith("average.")}


def load_average(name: str, model: nn.Module) -> nn.Module:
    """The stage's moving-average weights, into a model that is then frozen and in eval mode."""
    average = averages(name)
    missing, unexpected = model.load_state_dict(average, strict=False)
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    if unexpected or trained & set(missing):
        raise SystemExit(f"stage {name!r} was trained with another shape of model: {missing[:3]} {unexpected[:3]}")
    return model.eval().requires_grad_(False)
