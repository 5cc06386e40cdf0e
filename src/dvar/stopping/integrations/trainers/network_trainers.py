"""Adapter of trainers with a method `process_batch`: sd-scripts and musubi-tuner."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dvar.errors import RefusedInput
from dvar.stopping.probe import Probe


def probe_process_batch(
    process_batch: Callable[..., Any], held: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> Probe[Sequence[Mapping[str, Any]]]:
    """Return a probe of the trainer's own loss on batches that are held, one loss for each of them.

    The probe seeds the random generators, so noise and timesteps that the method draws are the same each time. The
    batches are passed as copies, because the method changes their lists in place.

    Args:
        process_batch: The trainer's method. It returns a loss, or a pair of a loss and something else.
        held: For each batch the arguments that belong to it: ``batch``; of musubi-tuner also ``latents`` and ``noise``.
        arguments: All other arguments by name; for sd-scripts with ``is_train=False``, so that nothing has a gradient.

    Raises:
        RefusedInput: There is no batch, or no module among the arguments.
    """
    if not held:
        raise RefusedInput(["a probe needs a batch to hold, got none: take one or more from the dataloader"])

    def compute_losses(batches: Sequence[Mapping[str, Any]]) -> Tensor:
        results = [process_batch(**arguments, **_copy_lists(batch)) for batch in batches]
        losses = [result[0] if isinstance(result, tuple) else result for result in results]
        return torch.stack([loss.float() for loss in losses])

    return Probe(compute_losses, held, tuple(_iter_modules(arguments.values())))


def _copy_lists(value: Any) -> Any:
    """Return a value with new dicts and lists around the same tensors."""
    if isinstance(value, Mapping):
        return {name: _copy_lists(part) for name, part in value.items()}
    return [_copy_lists(part) for part in value] if isinstance(value, list) else value


def _iter_modules(values: Any) -> Iterator[nn.Module]:
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, list | tuple):
            yield from _iter_modules(value)
