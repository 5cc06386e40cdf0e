"""The digest of a base model's weights, by which a run knows the model that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

LARGE = 10**9
"""Numbers from which on a model is hashed on several threads: one thread takes a minute for 12e9 and T5."""
_THREADS = 8


def digest_of_weights(networks: Sequence[nn.Module], noise: Tensor) -> str:
    """Return the SHA-256 of the networks' weights and of the noise schedule, the same in every precision that is exact.

    Of a model of `LARGE` numbers or more it is the SHA-256 of the digests of the tensors.

    Args:
        networks: The networks, on the CPU.
        noise: The noise schedule.
    """
    tensors = [(name, tensor) for network in networks for name, tensor in network.state_dict().items()]
    digest = sha256(noise.float().numpy().tobytes())
    if sum(tensor.numel() for _, tensor in tensors) < LARGE:  # as the digests in the runs that were recorded
        for name, tensor in tensors:
            digest.update(name.encode())
            digest.update(_bytes_of(tensor))
        return digest.hexdigest()
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        leaves = threads.map(lambda tensor: sha256(_bytes_of(tensor)).digest(), (tensor for _, tensor in tensors))
        for (name, _), leaf in zip(tensors, leaves, strict=True):
            digest.update(name.encode() + b"\0" + leaf)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    """Return the memory of a tensor, of a floating one in float32, into which half precision fits."""
    exact = tensor.float() if tensor.is_floating_point() else tensor
    return exact.contiguous().numpy().data
