"""Measures of a learned update, from its weights alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

DOWN, UP = "lora_A.weight", "lora_B.weight"


def stable_rank(state: Mapping[str, Tensor], untouched: Mapping[str, Tensor]) -> float | None:
    """Return the mean stable rank of what has been learned, ||W||_F^2 / ||W||_2^2 over its matrices W.

    A pair of LoRA matrices counts as their product, any other matrix as its change. Matrices that have not changed are
    left out.

    Args:
        state: The state of a method.
        untouched: Its state before the first step.

    Returns:
        None where no matrix has changed, as in Textual Inversion, which learns vectors.

    Source: Spectral Signatures of memorisation report that it rises as a model memorises.
    """
    ranks = []
    for update in _updates(state, untouched):
        values = torch.linalg.svdvals(update.float()).square()
        if values[0] > 0:
            ranks.append(values.sum() / values[0])
    return float(torch.stack(ranks).mean()) if ranks else None


def _updates(state: Mapping[str, Tensor], untouched: Mapping[str, Tensor]) -> Iterator[Tensor]:
    for name, weight in state.items():
        if name.endswith(UP):
            # The singular values of B A are those of R_B R_A^T, where B = Q_B R_B and A^T = Q_A R_A: rank by rank.
            down = state[name.removesuffix(UP) + DOWN]
            yield torch.linalg.qr(weight.float())[1] @ torch.linalg.qr(down.float().mT)[1].mT
        elif not name.endswith(DOWN) and weight.ndim == 2 and min(weight.shape) > 1:
            yield weight - untouched[name]
