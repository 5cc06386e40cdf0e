"""Frozen linear layers in 4 or 8 bits, by bitsandbytes."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def quantize_linears(
    network: Any,
    kind: str,
    precision: torch.dtype,
    device: torch.device | str,
    idle: torch.device | str | None = None,
) -> None:
    """Put linear layers of 4 or 8 bits in the place of those in the repeated blocks of a frozen network.

    What stands before and after the blocks is left as it is: it is a small share, and images depend on it most.

    Args:
        network: The network, on the CPU.
        kind: "nf4" or "int8".
        precision: The arithmetic of layers of 4 bits, and of all biases.
        device: The device on which the weights are converted.
        idle: The device on which they are left, by default that one.

    Source: Dettmers et al., QLoRA (2023): frozen weights in NF4, learned ones beside them in full precision.
    Deviates: diffusers quantises while it loads and asks for a GPU; here the weights have been hashed before, and a CPU
        does it too.
    """
    import bitsandbytes

    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # a line for each layer and step
    layers = bitsandbytes.nn
    for name in [name for name, _ in linears_in_blocks(network)]:
        layer = network.get_submodule(name)
        # Without a device their weights would be drawn at random first.
        size: dict[str, Any] = {"device": "meta", "bias": layer.bias is not None}
        size |= {"input_features": layer.in_features, "output_features": layer.out_features}
        weight, bias = layer.weight.data.to(precision), layer.bias
        if kind == "nf4":
            new = layers.Linear4bit(**size, compute_dtype=precision, quant_type="nf4")
            new.weight = layers.Params4bit(weight, requires_grad=False, quant_type="nf4")
            # A CPU would repack the weights in the first evaluation, for which their rows must be a multiple of 32.
            new.support_avx512bf16_for_cpu = False
        else:
            new = layers.Linear8bitLt(**size, has_fp16_weights=False)
            new.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            new.register_forward_pre_hook(_follow_weights)
        if bias is not None:
            new.bias = nn.Parameter(bias.data.to(precision), requires_grad=False)
        parent, _, place = name.rpartition(".")
        setattr(network.get_submodule(parent), place, new.to(device).to(idle or device).eval())
    # By which PEFT recognises what stands under its matrices.
    network.is_loaded_in_4bit, network.is_loaded_in_8bit = kind == "nf4", kind == "int8"


def linears_in_blocks(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers in the repeated blocks of a network, which are lists of modules, by their names."""
    lists = [name for name, part in network.named_modules() if isinstance(part, nn.ModuleList)]
    for name, layer in network.named_modules():
        if type(layer) is nn.Linear and any(name.startswith(f"{blocks}.") for blocks in lists):
            yield name, layer


def _follow_weights(layer: Any, _inputs: Any) -> None:
    """Have a layer of 8 bits read the weights that it has now.

    A network that is moved as a whole takes the weights along, and leaves behind what bitsandbytes reads in their place
    (0.49, issue 1791): they and the scales of their rows.
    """
    for holder in (layer.weight, layer.state):
        if holder.CB is not None and holder.CB.data_ptr() != layer.weight.data_ptr():
            holder.CB, holder.SCB = layer.weight.data, holder.SCB.to(layer.weight.device)
