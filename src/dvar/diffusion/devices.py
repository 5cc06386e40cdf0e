"""Devices and their memory."""

from __future__ import annotations

import sys

import torch


def best_device() -> str:
    """Return "cuda" where there is such a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


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
