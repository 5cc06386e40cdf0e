"""The recogniser's reading as arithmetic: what is near, what is likely, which subject it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dvar.mini.recogniser import HEADS, LEAST_SPREAD, PARAMETERS, Reading, Recogniser


def reading(mean: float, spread: float, pictures: int = 1) -> Reading:
    shape = (pictures, HEADS["class"], PARAMETERS)
    return Reading({}, torch.full(shape, mean), torch.full(shape, spread))


def vector(value: float) -> Tensor:
    return torch.full((PARAMETERS,), value)


def density(distance: float, spread: float) -> float:
    """Nine tenths of a Gaussian and a tenth of a flat one on [0, 1]."""
    return 0.1 + 0.9 * math.exp(-((distance / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))


def test_surprise_is_the_negative_logarithm_of_a_gaussian_that_may_go_astray() -> None:
    found = reading(0.5, 0.2).surprise(vector(0.6)[None], answer=3)
    assert math.isclose(float(found), -16 * math.log(density(0.1, 0.2)), rel_tol=1e-5)


def test_one_parameter_that_is_far_off_costs_no_more_than_the_flat_tenth() -> None:
    near, far = vector(0.5), vector(0.5)
    far[0] = 1.0  # fifty spreads away
    seen = reading(0.5, 0.01)
    cost = float(seen.surprise(far[None], answer=0) - seen.surprise(near[None], answer=0))
    assert math.isclose(cost, math.log(density(0, 0.01) / 0.1), rel_tol=1e-4)


def test_identity_is_the_share_of_the_own_density_against_each_distractor() -> None:
    # The own subject at the mean; one distractor 0.1 off in each of 16 parameters, and one at the mean too.
    found = reading(0.5, 0.2).identity(vector(0.5), torch.stack([vector(0.6), vector(0.5)]), answer=0)
    odds = (density(0, 0.2) / density(0.1, 0.2)) ** 16
    assert math.isclose(float(found), (odds / (odds + 1) + 0.5) / 2, rel_tol=1e-5)


def test_identity_of_a_reading_that_tells_nothing_is_chance() -> None:
    others = torch.rand(99, PARAMETERS, generator=torch.Generator().manual_seed(0))
    found = reading(0.5, 1e4, pictures=3).identity(vector(0.1), others, answer=0)
    assert torch.allclose(found, torch.full((3,), 0.5), atol=1e-5)


def test_identity_uses_the_class_it_is_asked_about() -> None:
    means = torch.zeros(1, HEADS["class"], PARAMETERS)
    means[:, 7] = 1.0
    seen = Reading({}, means, torch.full_like(means, 0.1))
    assert float(seen.identity(vector(1.0), vector(0.0)[None], answer=7)) > 0.99
    assert float(seen.identity(vector(1.0), vector(0.0)[None], answer=6)) < 0.01


def test_the_network_answers_every_head_for_every_picture_and_is_never_too_sure() -> None:
    torch.manual_seed(0)
    seen = Recogniser(width=8, hidden=16)(torch.randn(3, 3, 64, 64))
    assert {head: tuple(logits.shape) for head, logits in seen.logits.items()} == {h: (3, n) for h, n in HEADS.items()}
    assert seen.means.shape == seen.spreads.shape == (3, HEADS["class"], PARAMETERS)
    assert bool((seen.spreads >= LEAST_SPREAD * (1 - 1e-6)).all())
