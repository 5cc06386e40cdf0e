"""The random draws of a script on a held sample: its own generators, and timesteps from equal strata."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dvar.launch.held import permute

DRAWS = ("rand", "randn", "randint", "normal", "randperm", "bernoulli", "multinomial")


@contextmanager
def fix_draws(seed: int, sample: int, samples: int) -> Iterator[None]:
    """Fix what is drawn inside the scope beside the global generators.

    A generator that the script passes to a function of torch begins with ``seed`` and has its own state again
    afterwards. The first vector that is drawn, which in diffusion training is one timestep (or its quantile) for each
    image, is stratified: over all held samples, each of its entries is drawn once from each of as many equal strata.

    Args:
        seed: Seed of this sample.
        sample: Number of this held sample.
        samples: Number of held samples.
    """
    scope = _Draws(seed, sample, samples)
    originals = {name: getattr(torch, name) for name in DRAWS}
    for name, draw in originals.items():
        setattr(torch, name, scope.wrap(name, draw))
    try:
        yield
    finally:
        for name, draw in originals.items():
            setattr(torch, name, draw)
        for generator, state in scope.states:
            generator.set_state(state)


class _Draws:
    """The state of one scope: the generators met, and whether the timesteps have been drawn."""

    def __init__(self, seed: int, sample: int, samples: int) -> None:
        self.seed, self.sample, self.samples = seed, sample, samples
        self.states: list[tuple[torch.Generator, Tensor]] = []
        self._stratified = False

    def wrap(self, name: str, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def drawn_from_fixed(*args: Any, **settings: Any) -> Tensor:
            generator = settings.get("generator")
            if generator is not None and all(generator is not other for other, _ in self.states):
                self.states.append((generator, generator.get_state()))
                generator.manual_seed(self.seed)
            values = draw(*args, **settings)
            if not self._stratified and values.ndim == 1 and name in _QUANTILES:
                self._stratified = True
                quantiles = stratified_quantiles(len(values), self.sample, self.samples, self.seed)
                values.copy_(_QUANTILES[name](quantiles, args, settings))
            return values

        return drawn_from_fixed


def stratified_quantiles(length: int, sample: int, samples: int, seed: int) -> Tensor:
    """Return the quantiles of one held sample, float64 [length], inside (0, 1).

    Each entry falls once into each of ``samples`` equal strata over all held samples, and all entries of all samples
    fall once into each of ``samples * length`` strata.
    """
    fine = permute(length, length, samples)
    coarse = torch.tensor([permute(samples, length, samples, entry)[sample] for entry in range(length)])
    jitter = torch.rand(length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (coarse * length + torch.tensor(fine) + jitter.clamp(1e-9, 1 - 1e-9)) / (samples * length)


def _invert_randint(quantiles: Tensor, args: Sequence[Any], settings: dict[str, Any]) -> Any:
    numbers = [*(item for item in args if isinstance(item, int | float)), settings.get("high", 0)]
    low, high = (numbers[0], numbers[1]) if len(args) > 1 and isinstance(args[1], int | float) else (0, numbers[0])
    low, high = settings.get("low", low), settings.get("high", high)
    return (low + quantiles * (high - low)).floor()


def _invert_normal(quantiles: Tensor, args: Sequence[Any], settings: dict[str, Any]) -> Any:
    named = [settings.get("mean", 0.0), settings.get("std", 1.0)]
    mean, std = (*args[:2], *named[len(args[:2]) :])
    return torch.special.ndtri(quantiles) * std + mean


_QUANTILES: dict[str, Callable[[Tensor, Sequence[Any], dict[str, Any]], Any]] = {
    "rand": lambda quantiles, args, settings: quantiles,
    "randn": lambda quantiles, args, settings: torch.special.ndtri(quantiles),
    "randint": _invert_randint,
    "normal": _invert_normal,
}
"""From quantiles to the values of a function of torch with these arguments."""
