"""Low-rank changes of one network that differ from sample to sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import Tensor, nn

from dvar.errors import RefusedInput

ADAPTER = "default"
"""The name that PEFT gives to an adapter which is given none."""

Adapters = Mapping[str, AdaptedLinear]
"""The adapted layers of a network, by name."""


def adapters_of(network: nn.Module) -> Adapters:
    """Return the adapted layers of a network in which LoRA alone is trained.

    Raises:
        RefusedInput: Something else in it is trained, or it drops out at random while it trains.
    """
    layers = {name: part for name, part in network.named_modules() if isinstance(part, AdaptedLinear)}
    matrices = {id(part[ADAPTER].weight) for layer in layers.values() for part in (layer.lora_A, layer.lora_B)}
    others = [name for name, part in network.named_parameters() if part.requires_grad and id(part) not in matrices]
    if layers:
        others += [name for name, part in network.named_modules() if isinstance(part, nn.Dropout) and part.p]
    if others:
        rule = "runs of a pack share one frozen denoising network, which linear layers of LoRA alone may change"
        raise RefusedInput(f"{rule}, and here {others[0]} is trained or random: train it without --pack")
    return layers


@contextmanager
def changed_by_rows(network: nn.Module, rows: Sequence[tuple[Adapters, int]]) -> Iterator[None]:
    """Have a network add, in a scope, the low-rank changes of several copies of it, each to samples of its own.

    A layer's changes are two batched products over all samples; those of a copy that does not adapt it are zero, and so
    is what a lower rank lacks. The gradients of each copy's matrices come from its own samples alone.

    Args:
        network: The network, which has no adapters.
        rows: The adapters of each copy, and how many samples it has, in the order of the samples.
    """
    names = dict.fromkeys(name for adapters, _ in rows for name in adapters)
    hooks = [
        network.get_submodule(name).register_forward_hook(
            partial(_add_changes, [(adapters.get(name), count) for adapters, count in rows])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_changes(
    rows: Sequence[tuple[AdaptedLinear | None, int]], layer: nn.Linear, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Return the output of a linear layer [B, ..., out] with the change of each sample.

    Source: Hu et al., LoRA (2021), Equation 3, in the precision and the order of PEFT's layer.
    """
    present = [adapted for adapted, _ in rows if adapted is not None]
    rank, weight = max(adapted.r[ADAPTER] for adapted in present), present[0].lora_A[ADAPTER].weight
    firsts, seconds, scales = [], [], []
    for adapted, count in rows:
        if adapted is None:
            first, second = weight.new_zeros(rank, layer.in_features), weight.new_zeros(layer.out_features, rank)
        else:
            missing = rank - adapted.r[ADAPTER]
            first = F.pad(adapted.lora_A[ADAPTER].weight, (0, 0, 0, missing))
            second = F.pad(adapted.lora_B[ADAPTER].weight, (0, missing))
        firsts.append(first.expand(count, -1, -1))
        seconds.append(second.expand(count, -1, -1))
        scales += [0.0 if adapted is None else adapted.scaling[ADAPTER]] * count
    states = inputs[0].to(weight.dtype).reshape(len(scales), -1, layer.in_features)
    thin = torch.bmm(states, torch.cat(firsts).transpose(1, 2))
    change = torch.bmm(thin, torch.cat(seconds).transpose(1, 2)).view(output.shape)
    factors = change.new_tensor(scales).view(-1, *[1] * (output.dim() - 1))
    return (output + change * factors).to(output.dtype)
