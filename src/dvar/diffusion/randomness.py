"""Randomness by key: every draw is named and none is carried over, so no draw can shift another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def seed_for(seed: int, stream: str, step: int = 0, index: int = 0) -> int:
    """Return the seed of one draw, in [0, 2**63).

    It is a BLAKE2 digest of the key, not `hash()`, and so the same on every machine and in every version of Python.

    Args:
        seed: The seed of the run.
        stream: The name of the draw.
        step: The step for which it is drawn.
        index: The sample of the step.
    """
    key = f"{seed}\0{stream}\0{step}\0{index}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, step: int = 0, index: int = 0) -> torch.Generator:
    """Return a fresh CPU generator for one draw; the arguments are those of `seed_for`.

    Torch uses the low 32 bits of a seed, so about one pair of draws in 4e9 coincides.
    """
    return torch.Generator().manual_seed(seed_for(seed, stream, step, index))


@contextmanager
def seeded_globals(seed: int, stream: str, step: int = 0, index: int = 0) -> Iterator[None]:
    """Seed torch's global generators by key in a scope, and restore their state after it.

    This is for what takes no generator, such as dropout. CUDA's generators are included once it is in use; each costs
    a copy of its state.
    """
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if initialized else ()
    with torch.random.fork_rng(devices):
        key = seed_for(seed, stream, step, index)
        torch.default_generator.manual_seed(key)
        if devices:
            torch.cuda.manual_seed_all(key)
        yield
