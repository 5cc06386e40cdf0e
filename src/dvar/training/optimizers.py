"""The optimisers by their names, and what of them a run must keep to go on; SAM's look at the steeper point."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
from torch import Tensor, nn

from dvar.config.training import TrainingConfig


def optimizer_of(config: TrainingConfig, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimiser that ``config`` names, for ``parameters``.

    Source: AdamW, as the paper trains; SAM over SGD with momentum 0.9, as in the paper's first version; Prodigy with
    the switches of diffusers' scripts.
    """
    adam: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.adam_weight_decay,
    }
    match config.optimizer:
        case "adamw8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(parameters, **adam)
        case "prodigy":
            from prodigyopt import Prodigy

            with redirect_stdout(io.StringIO()):  # it prints that its weight decay is AdamW's
                return Prodigy(parameters, **adam, use_bias_correction=True, safeguard_warmup=True)
        case "sam":
            return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)
    return torch.optim.AdamW(parameters, **adam)


@contextmanager
def sharpened(parameters: Sequence[nn.Parameter], radius: float) -> Iterator[None]:
    """Run a scope with ``parameters`` moved by ``radius`` along their gradients, and put back bit for bit after it.

    The gradient that is taken inside is the one that SAM steps by: at the point where the loss is steepest within
    ``radius``.  Only the direction of the gradients counts, not their scale.

    Source: the optimiser of the paper's first version (Foret et al. 2021, not adaptive).
    Deviates: the released code takes its second gradient through the graph of the first, at the unmoved point.
    """
    moved = [(part, part.grad) for part in parameters if part.grad is not None]
    before = [part.detach().clone() for part, _ in moved]
    with torch.no_grad():
        factor = radius / (nn.utils.get_total_norm([grad for _, grad in moved]) + 1e-12)
        for part, grad in moved:
            part.add_(grad * factor)
    try:
        yield
    finally:
        with torch.no_grad():
            for (part, _), value in zip(moved, before, strict=True):
                part.copy_(value)


def kept(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state of ``optimizer``: its tensors by their path, on the CPU, and what else of it moved, plain JSON.

    Prodigy keeps its estimates among its settings, so every setting that is not the first one any more is state.
    """
    state = optimizer.state_dict()
    leaves = dict(_leaves(state["state"]))
    groups = [
        {name: value for name, value in group.items() if name != "params" and value != optimizer.defaults.get(name)}
        for group in state["param_groups"]
    ]
    plain = {path: leaf for path, leaf in leaves.items() if not isinstance(leaf, Tensor)}
    return {path: leaf.cpu() for path, leaf in leaves.items() if isinstance(leaf, Tensor)}, {
        "plain": plain,
        "groups": groups,
    }


def put_back(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Give a fresh ``optimizer`` the state that `kept` returned."""
    state: dict[Any, Any] = {}
    for path, leaf in {**tensors, **facts["plain"]}.items():
        index, *names = path.split("/")
        place = state.setdefault(int(index), {})
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = leaf
    groups = optimizer.state_dict()["param_groups"]
    groups = [{**group, **moved} for group, moved in zip(groups, facts["groups"], strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _leaves(tree: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}/")
        else:
            yield f"{path}{name}", value
