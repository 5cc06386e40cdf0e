"""Randomness by key: every draw is named, none is carried over, so nothing drawn can shift what is drawn elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


def seed_for(seed: int, stream: str, step: int = 0, index: int = 0) -> int:
    """Return the seed in [0, 2**63) of one draw: of sample ``index`` of ``step`` in the named ``stream`` of a run.

    The same on every machine and in every version of Python: it is a BLAKE2 digest of the four, not `hash()`.
    """
    key = f"{seed}\0{stream}\0{step}\0{index}".encode()
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, stream: str, step: int = 0, index: int = 0) -> torch.Generator:
    """Return a fresh CPU generator for one draw.

    Torch keeps the low 32 bits of a seed, so that about one pair of draws in 4e9 coincides.
    """
    return torch.Generator().manual_seed(seed_for(seed, stream, step, index))


@contextmanager
def seeded_globals(seed: int, stream: str, step: int = 0, index: int = 0) -> Iterator[None]:
    """Run a scope under torch's global generators seeded by key, and put back what they were.

    For what takes no generator, such as dropout.  CUDA's generators are included once it is in use; each costs a copy
    of its state.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        key = seed_for(seed, stream, step, index)
        torch.default_generator.manual_seed(key)
        if devices:
            torch.cuda.manual_seed_all(key)
        yield
