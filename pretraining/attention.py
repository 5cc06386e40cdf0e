"""The logits of the U-Net's attention: read at every forward pass, counted where they are hard, bounded where they are
large.

A softmax whose logits lie a hundred apart passes hardly any gradient, but where two keys change places, and there a
large one.  Bounding what a head can reach keeps training on the model smooth: each row of logits may rise at most
`BOUND` above its own mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

BOUND = 25.0
HARD = 0.999
"""A query is hard when one key has more than this share of its weight."""


@contextmanager
def watched(model: nn.Module, look: Callable[[str, Attention, Tensor], None]) -> Iterator[None]:
    """Call ``look`` before each attention module of ``model`` runs, in the order of the forward pass.

    Args:
        look: Takes the module's name, the module, and its logits, float32 [batch, heads, queries, keys], scaled as its
            softmax gets them and without gradient.  What it does to the module's weights takes effect at once.
    """

    def hook(name: str) -> Callable[[Attention, Any, dict[str, Any]], None]:
        def before(module: Attention, inputs: Any, named: dict[str, Any]) -> None:
            look(name, module, logits(module, inputs[0], named.get("encoder_hidden_states")))

        return before

    hooks = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Attention)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@torch.no_grad()
def logits(module: Attention, hidden: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the logits [batch, heads, queries, keys] of a module's queries from ``hidden`` on keys from ``context``,
    or from ``hidden`` itself."""
    query = module.head_to_batch_dim(module.to_q(hidden), out_dim=4)
    key = module.head_to_batch_dim(module.to_k(hidden if context is None else context), out_dim=4)
    with torch.autocast(query.device.type, enabled=False):
        return module.scale * query.float() @ key.float().mT


def peaks(logits: Tensor) -> Tensor:
    """Return how far each head's largest logit rises above the mean of its row, [heads]."""
    return (logits.amax(dim=3) - logits.mean(dim=3)).amax(dim=(0, 2))


@torch.no_grad()
def bound_heads(module: Attention, peak: Tensor, bound: float = BOUND) -> int:
    """Scale the queries and keys of each head whose ``peak`` [heads] exceeds ``bound``, so that it shrinks to that.

    Returns:
        How many heads that were; the weights of the others keep their bits.

    Source: QK-Clip, Kimi K2 (2025), which bounds the logit itself; here it is its rise above the mean of its row,
        since a softmax does not see that mean.
    """
    factor = (bound / peak).clamp(max=1).sqrt()
    for projection in (module.to_q, module.to_k):
        for parameter in projection.parameters():
            heads = parameter.unflatten(0, (module.heads, -1))
            heads.mul_(factor.view(-1, *[1] * (heads.ndim - 1)))
    return int((factor < 1).sum())


def hard_share(probabilities: Tensor) -> float:
    """Return the share of rows of attention weights [..., keys] that give one key more than `HARD`."""
    return float((probabilities.amax(dim=-1) > HARD).float().mean())


@torch.no_grad()
def hardness(model: nn.Module, forward: Callable[[], object]) -> dict[str, float]:
    """Return the share of hard queries of each attention module while ``forward`` runs the model once."""
    shares: dict[str, float] = {}

    def look(name: str, module: Attention, logits: Tensor) -> None:
        shares[name] = hard_share(logits.softmax(dim=-1))

    with watched(model, look):
        forward()
    return shares
