"""The recogniser's arithmetic: surprise, identity, and the shapes of its answers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dvar.mini.recogniser import LEAST_SPREAD, RECOGNISED, Recogniser, Recognition, load

CLASSES, PARAMETERS = 25, 16


def build_uniform_recognition(mean: float, spread: float, images: int = 1) -> Recognition:
    shape = (images, CLASSES, PARAMETERS)
    return Recognition({}, torch.full(shape, mean), torch.full(shape, spread))


def build_vector(value: float) -> Tensor:
    return torch.full((PARAMETERS,), value)


def compute_density(distance: float, spread: float) -> float:
    """Return nine tenths of a Gaussian density plus a tenth of the uniform one on [0, 1]."""
    return 0.1 + 0.9 * math.exp(-((distance / spread) ** 2) / 2) / (spread * math.sqrt(2 * math.pi))


def test_surprise_is_the_negative_logarithm_of_a_gaussian_that_may_go_astray() -> None:
    surprise = build_uniform_recognition(0.5, 0.2).surprise(build_vector(0.6)[None], answer=3)
    assert math.isclose(float(surprise), -16 * math.log(compute_density(0.1, 0.2)), rel_tol=1e-5)


def test_one_parameter_that_is_far_off_costs_no_more_than_the_flat_tenth() -> None:
    near, far = build_vector(0.5), build_vector(0.5)
    far[0] = 1.0  # fifty spreads away
    recognition = build_uniform_recognition(0.5, 0.01)
    cost = float(recognition.surprise(far[None], answer=0) - recognition.surprise(near[None], answer=0))
    assert math.isclose(cost, math.log(compute_density(0, 0.01) / 0.1), rel_tol=1e-4)


def test_identity_is_the_share_of_the_own_density_against_each_distractor() -> None:
    # The own subject at the mean; one distractor 0.1 off in each of 16 parameters, and one at the mean too.
    identity = build_uniform_recognition(0.5, 0.2).identity(
        build_vector(0.5), torch.stack([build_vector(0.6), build_vector(0.5)]), answer=0
    )
    odds = (compute_density(0, 0.2) / compute_density(0.1, 0.2)) ** 16
    assert math.isclose(float(identity), (odds / (odds + 1) + 0.5) / 2, rel_tol=1e-5)


def test_identity_without_information_is_chance() -> None:
    others = torch.rand(99, PARAMETERS, generator=torch.Generator().manual_seed(0))
    identity = build_uniform_recognition(0.5, 1e4, images=3).identity(build_vector(0.1), others, answer=0)
    assert torch.allclose(identity, torch.full((3,), 0.5), atol=1e-5)


def test_identity_uses_the_requested_class() -> None:
    means = torch.zeros(1, CLASSES, PARAMETERS)
    means[:, 7] = 1.0
    recognition = Recognition({}, means, torch.full_like(means, 0.1))
    assert float(recognition.identity(build_vector(1.0), build_vector(0.0)[None], answer=7)) > 0.99
    assert float(recognition.identity(build_vector(1.0), build_vector(0.0)[None], answer=6)) < 0.01


def test_the_network_answers_every_head_for_every_image_and_bounds_its_certainty() -> None:
    torch.manual_seed(0)
    answers = dict(zip(RECOGNISED, (CLASSES, 11, 4, 14), strict=True))
    recognition = Recogniser(answers, PARAMETERS, width=8, hidden=16)(torch.randn(3, 3, 64, 64))
    assert {head: tuple(logits.shape) for head, logits in recognition.logits.items()} == {
        h: (3, n) for h, n in answers.items()
    }
    assert recognition.means.shape == recognition.spreads.shape == (3, CLASSES, PARAMETERS)
    assert bool((recognition.spreads >= LEAST_SPREAD * (1 - 1e-6)).all())


def test_a_recogniser_of_another_world_is_loaded_with_its_own_numbers_of_answers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = Recogniser(dict.fromkeys(RECOGNISED, 3) | {"class": 5}, parameters=7)
    save_file(trained.state_dict(), tmp_path / "recogniser.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, loaded = trained(images), load(tmp_path / "recogniser.safetensors")(images)
    assert torch.equal(loaded.means, expected.means)
    assert all(torch.equal(loaded.logits[name], expected.logits[name]) for name in RECOGNISED)
