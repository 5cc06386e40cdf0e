"""The optimizers of training, and their state in checkpoints."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from dvar.config.training import TrainingConfig


def make_optimizer(
    config: TrainingConfig, parameters: Sequence[nn.Parameter], factors: Sequence[float] = ()
) -> torch.optim.Optimizer:
    """Return the optimizer that ``config`` names, for ``parameters``.

    Args:
        config: The config.
        parameters: What is trained.
        factors: The learning rate of each of them as a multiple of the config's; by default 1. The groups of the
            optimizer hold theirs as "factor", unless all are 1.

    Source: AdamW, as the paper trains; SAM over SGD with momentum 0.9, as in the paper's first version; Prodigy with
        the switches of diffusers' scripts.
    """
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    optimizer: torch.optim.Optimizer
    trained: Any = parameters
    if any(factor != 1 for factor in factors):
        trained = [
            {"params": [part for part, own in zip(parameters, factors, strict=True) if own == factor], "factor": factor}
            for factor in dict.fromkeys(factors)
        ]
    match config.optimizer:
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(trained, **adam)
        case "prodigy":
            from prodigyopt import Prodigy

            with redirect_stdout(io.StringIO()):  # it prints that its weight decay is AdamW's
                optimizer = Prodigy(trained, **adam, use_bias_correction=True, safeguard_warmup=True)
        case "sam":
            optimizer = torch.optim.SGD(trained, lr=config.learning_rate, momentum=0.9)
        case "adamw":
            optimizer = torch.optim.AdamW(trained, **adam)
    return optimizer


@contextmanager
def perturb(parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """Move ``parameters`` by ``radius`` along their gradients in a scope, and restore them bit for bit after it.

    The gradient computed in the scope is the one that SAM applies: at the point where the loss is steepest within
    ``radius``. Only the direction of the gradients counts, not their scale.

    Source: The optimizer of the paper's first version (Foret et al. 2021, not adaptive).
    Deviates: The released code computes its second gradient through the graph of the first, at the unmoved point.
    """
    pairs = [(part, part.grad) for part in parameters if part.grad is not None]
    originals = [part.detach().clone() for part, _ in pairs]
    with torch.no_grad():
        factor = radius / (nn.utils.get_total_norm([gradient for _, gradient in pairs]) + 1e-12)
        for part, gradient in pairs:
            part.add_(gradient * factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for (part, _), original in zip(pairs, originals, strict=True):
                part.copy_(original)


def read_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of ``optimizer``: tensors by path, on the CPU, and the rest as plain JSON.

    Prodigy keeps its estimates among its settings, so every setting that differs from its initial value is state.
    """
    state = optimizer.state_dict()
    leaves = dict(_iter_leaves(state["state"]))
    groups = [
        {name: value for name, value in group.items() if name != "params" and value != optimizer.defaults.get(name)}
        for group in state["param_groups"]
    ]
    # Copies, for bitsandbytes has one table for the states of all matrices, and a file has each tensor once.
    tensors = {path: leaf.to("cpu", copy=True) for path, leaf in leaves.items() if isinstance(leaf, Tensor)}
    plain = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, Tensor)}
    return tensors, {"plain": plain, "groups": groups}


def load_state(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Load into a fresh ``optimizer`` what `read_state` returned."""
    state: dict[Any, Any] = {}
    for path, leaf in {**tensors, **facts["plain"]}.items():
        index, *names = path.split("/")
        branch = state.setdefault(int(index), {})
        for name in names[:-1]:
            branch = branch.setdefault(name, {})
        branch[names[-1]] = leaf
    groups = optimizer.state_dict()["param_groups"]
    groups = [{**group, **changes} for group, changes in zip(groups, facts["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _iter_leaves(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) for each leaf of nested mappings."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _iter_leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
