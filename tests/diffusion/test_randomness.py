"""Randomness by key."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from dvar.diffusion.randomness import generator, seed_for, seeded_globals

KEYS = st.tuples(st.integers(0, 2**40), st.text(max_size=8), st.integers(0, 10**6), st.integers(0, 10**4))


def test_a_seed_is_stable_across_versions() -> None:
    # First 8 bytes, big-endian, of BLAKE2b with a digest of 8 over b"0\x00train\x001\x002", halved:
    # python -c "import hashlib; print(int(hashlib.blake2b(b'0\0train\x001\x002', digest_size=8).hexdigest(), 16) // 2)"
    assert seed_for(0, "train", 1, 2) == 1856423242365737919


@given(st.sets(KEYS, min_size=2, max_size=20))
def test_different_keys_have_different_seeds(keys: set[tuple[int, str, int, int]]) -> None:
    seeds = {seed_for(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_draw_depends_only_on_its_key() -> None:
    first = torch.randn(8, generator=generator(3, "noise", 5, 1))
    torch.manual_seed(99)
    torch.randn(100)
    assert torch.equal(torch.randn(8, generator=generator(3, "noise", 5, 1)), first)
    assert not torch.equal(torch.randn(8, generator=generator(3, "noise", 5, 2)), first)


def test_seeded_globals_draws_by_key_and_restores_the_global_state() -> None:
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    with seeded_globals(0, "dropout", 4):
        numbers = torch.randn(3)
    assert torch.equal(torch.randn(3), expected)
    with seeded_globals(0, "dropout", 4):
        assert torch.equal(torch.randn(3), numbers)


def test_seeded_globals_restores_the_global_state_after_an_error() -> None:
    state = torch.get_rng_state()
    try:
        with seeded_globals(0, "dropout"):
            torch.randn(3)
            raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(torch.get_rng_state(), state)
