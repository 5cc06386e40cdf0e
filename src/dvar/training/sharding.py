"""A base model sharded over the processes of a run."""

# What trains is small and whole on each process, so that gradients, optimizer, checkpoints and exports are those of a
# run without FSDP. What is frozen is split, and gathered block by block whenever all processes make a forward or a
# backward pass together.

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.sampling import sample
from dvar.errors import ModelError
from dvar.training.processes import Processes
from dvar.training.shard_fit import reshards

Sampler = Callable[..., list[Image.Image]]
"""What `sample` is."""


def shard_backbone(backbone: Backbone, processes: Processes) -> Backbone:
    """Return a base model of which each process holds a part alone, but for what trains.

    Args:
        backbone: The base model, whole on the CPU, with the method put into it.
        processes: The processes of the run, of which each one calls this.

    Raises:
        ModelError: A network has no blocks that can be gathered one by one.
    """
    mesh = init_device_mesh(backbone.device.type, (processes.count,))
    return backbone.sharded(partial(_shard, mesh=mesh, device=backbone.device))


def _shard(network: nn.Module, mesh: DeviceMesh, device: torch.device) -> None:
    """Split the frozen weights of a network over the processes of ``mesh``, so that each block is gathered alone."""
    names = {*(getattr(network, "_no_split_modules", None) or ())}
    blocks = [part for part in network.modules() if type(part).__name__ in names]
    if not blocks:
        kind = type(network).__name__
        raise ModelError(f"FSDP gathers a network block by block, a {kind} names none: launch without --use_fsdp")
    trained = {weight for weight in network.parameters() if weight.requires_grad}
    for part in (*reversed(blocks), network):  # a block within a block comes first
        fully_shard(part, mesh=mesh, reshard_after_forward=reshards(os.environ), ignored_params=trained)
    for weight in trained:
        weight.data = weight.data.to(device)


def sampler_of(processes: Processes) -> Sampler:
    """Return `sample` for the main process of a run: where the base model is sharded, the others take part.

    They cannot be called back from a forward pass, so images that are begun are completed: nothing is abandoned.
    """
    if not processes.sharded:
        return sample

    def sample_together(
        backbone: Backbone,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        interrupted: object = None,
        **options: Any,
    ) -> list[Image.Image]:
        processes.call("sample", prompts=list(prompts), seeds=list(seeds), **options)
        return sample(backbone, prompts, seeds, **options)

    return sample_together
