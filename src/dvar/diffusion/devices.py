"""Devices and their memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def best_device() -> str:
    """Return the current GPU where there is one of CUDA, else "cpu", as also under ``accelerate launch --cpu``."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    # By its number: without one, diffusers' hooks take the first GPU in every process.
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() and not on_cpu else "cpu"


@contextmanager
def float32_arithmetic(allow_tf32: bool = False) -> Iterator[None]:
    """Compute float32 as float32 in a scope, on a GPU too, or with ``allow_tf32`` in TensorFloat-32 there.

    By itself torch computes convolutions in TensorFloat-32, which has 10 of the 23 bits of float32's mantissa. What the
    rule must see of L_det is in its third digit.
    """
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def leave_autocast(network: nn.Module, device: torch.device) -> None:
    """Have a network compute in the precision of its weights, under autocast too.

    Args:
        network: The network.
        device: Where it computes.
    """
    network.register_forward_pre_hook(partial(_enter_full_precision, device.type))
    network.register_forward_hook(_exit_full_precision, always_call=True)


def _enter_full_precision(device_type: str, network: Any, _inputs: Any) -> None:
    network.full_precision = torch.autocast(device_type, enabled=False)
    network.full_precision.__enter__()


def _exit_full_precision(network: Any, _inputs: Any, _outputs: Any) -> None:
    network.full_precision.__exit__(None, None, None)


def describe_arithmetic(device: torch.device, mixed_precision: str) -> dict[str, Any]:
    """Return on what and how a run computes, as its result.json says it."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "threads": torch.get_num_threads(),
        "mixed_precision": mixed_precision,
        "tf32": cuda and torch.backends.cudnn.allow_tf32,
    }


def copy_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of tensors on the CPU; those of a GPU are copied together, with one wait at their end."""
    gpu = any(tensor.is_cuda for tensor in tensors.values())
    copies = {
        name: torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda).copy_(tensor.detach(), non_blocking=gpu)
        for name, tensor in tensors.items()
    }
    if gpu:
        torch.cuda.current_stream().synchronize()
    return copies


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process has held at once.

    On a GPU they are those of its tensors, elsewhere the process's memory; None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
