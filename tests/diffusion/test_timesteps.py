"""Densities of timesteps, weights in the loss, shifted noise and dropped captions."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvar.config.methods import TextualInversionConfig
from dvar.config.objective import ObjectiveConfig
from dvar.config.training import problems
from dvar.diffusion.objective import Draws, Encoded, Schedule, draw
from dvar.diffusion.timesteps import LOGIT_NORMAL, UNIFORM, Density, density_of, loss_weights
from dvar.errors import RefusedInput

EMPTY = torch.full((3,), 99)


@pytest.fixture(scope="module")
def examples() -> Encoded:
    moments = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    return Encoded(moments, [torch.arange(20 * index, 20 * index + 12).reshape(4, 3) for index in range(3)])


def draw_many(examples: Encoded, count: int = 400, **options: Any) -> Draws:
    return draw(examples, timesteps=1000, seed=5, stream="train", count=count, **options)


def weights_of(schedule: Schedule, **options: Any) -> Tensor | None:
    settings: dict[str, Any] = {"snr_gamma": None, "weighting": "none", **options}
    return loss_weights(schedule.signals, schedule.spreads, schedule.prediction_type, **settings)


@given(seed=st.integers(0, 2**31), scale=st.floats(-1, 1.75))
def test_mode_is_that_of_diffusers_and_stays_between_0_and_1(seed: int, scale: float) -> None:
    place = Density("mode", scale=scale).draw(torch.Generator().manual_seed(seed))
    expected = compute_density_for_timestep_sampling(
        "mode", 1, mode_scale=scale, generator=torch.Generator().manual_seed(seed)
    )
    assert math.isclose(place, float(expected), abs_tol=1e-5)
    assert -1e-6 <= place <= 1 + 1e-6


@pytest.mark.parametrize(
    ("density", "quartiles"),
    [
        (UNIFORM, (0.25, 0.5, 0.75)),
        # The quartiles of the sigmoid of a Gaussian of mean 1 and deviation 0.5.
        (Density("logit-normal", mean=1.0, std=0.5), (0.65986, 0.73106, 0.79201)),
        # u -> 3 u / (1 + 2 u)
        (Density("shifted", shift=3.0), (0.5, 0.75, 0.9)),
        (Density("shifted", shift=1.0), (0.25, 0.5, 0.75)),
        # u -> 1 - u - 1.29 (cos^2(pi u / 2) - 1 + u)
        (Density("mode", scale=1.29), (0.38357, 0.5, 0.61643)),
    ],
)
def test_places_have_the_quartiles_of_their_density(density: Density, quartiles: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    places = torch.tensor([density.draw(generator) for _ in range(8000)], dtype=torch.float64)
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(
        places.quantile(shares), torch.tensor(quartiles, dtype=torch.float64), rtol=0, atol=0.015
    )


def test_timesteps_follow_their_density_and_nothing_else_changes(examples: Encoded) -> None:
    plain = draw_many(examples)
    shifted = draw_many(examples, density=Density("shifted", shift=3.0))
    assert shifted.timesteps.float().mean() > plain.timesteps.float().mean() + 100
    assert all(
        torch.equal(getattr(plain, item.name), getattr(shifted, item.name))
        for item in fields(Draws)
        if item.name not in ("timesteps", "mask")
    )


def test_the_model_chooses_unless_a_density_is_named() -> None:
    assert density_of(ObjectiveConfig(), LOGIT_NORMAL) is LOGIT_NORMAL
    assert density_of(ObjectiveConfig(timestep_sampling="uniform"), LOGIT_NORMAL).kind == "uniform"
    config = ObjectiveConfig(timestep_sampling="logit-normal", logit_mean=-1.0, logit_std=2.0)
    assert density_of(config, UNIFORM) == Density("logit-normal", -1.0, 2.0)


def test_offset_noise_adds_one_number_to_each_channel(examples: Encoded) -> None:
    plain, offset = draw_many(examples), draw_many(examples, noise_offset=0.5)
    difference = offset.noise - plain.noise
    torch.testing.assert_close(difference, difference[:, :, :1, :1].expand_as(difference), rtol=0, atol=1e-5)
    numbers = difference[:, :, 0, 0]
    assert len({*numbers.flatten().tolist()}) == numbers.numel()
    # 1600 numbers of deviation 0.5: that of their deviation is 0.5 / sqrt(3200).
    assert abs(float(numbers.std()) - 0.5) < 6 * 0.5 / 3200**0.5
    assert torch.equal(replace(offset, noise=plain.noise).timesteps, plain.timesteps)
    assert torch.equal(offset.vae_noise, plain.vae_noise)


def test_captions_are_dropped_as_often_as_they_should_be(examples: Encoded) -> None:
    plain = draw_many(examples)
    dropped = draw_many(examples, caption_dropout=0.25, empty_caption=EMPTY)
    is_empty = (dropped.input_ids == EMPTY).all(dim=1)
    # 400 samples: the deviation of the count is sqrt(400 * 0.25 * 0.75) = 8.7.
    assert abs(int(is_empty.sum()) - 100) < 52
    assert torch.equal(dropped.input_ids[~is_empty], plain.input_ids[~is_empty])
    assert torch.equal(dropped.noise, plain.noise)
    assert torch.equal(dropped.moments, plain.moments)


def test_draws_with_every_option_do_not_depend_on_how_a_step_is_split(examples: Encoded) -> None:
    options: dict[str, Any] = {"noise_offset": 0.1, "caption_dropout": 0.5, "empty_caption": EMPTY}
    whole = draw_many(examples, 6, density=Density("mode"), **options)
    part = draw_many(examples, 4, first=2, density=Density("mode"), **options)
    assert torch.equal(whole.noise[2:], part.noise)
    assert torch.equal(whole.input_ids[2:], part.input_ids)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_diffusers_scripts(kind: str, gamma: float) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    weights = weights_of(Schedule.diffusion(scheduler.alphas_cumprod, kind, 1.0), snr_gamma=gamma)
    ratio = compute_snr(scheduler, torch.arange(1000))
    base = torch.stack([ratio, gamma * torch.ones(1000)], dim=1).min(dim=1)[0]
    # Of velocity the weight is min(SNR, gamma) / (SNR + 1), Hang et al. (2023), after Equation 8.
    torch.testing.assert_close(weights, base / ratio if kind == "epsilon" else base / (ratio + 1))
    assert weights is not None
    assert weights.isfinite().all()


def test_a_timestep_without_signal_has_a_finite_weight() -> None:
    schedule = Schedule.diffusion(torch.tensor([0.5, 0.0]), "epsilon", 1.0)
    assert weights_of(schedule, snr_gamma=5.0) is not None
    torch.testing.assert_close(weights_of(schedule, snr_gamma=5.0), torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_of_noise_levels_are_those_of_diffusers_scripts(weighting: str) -> None:
    sigmas = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.sort().values
    weights = weights_of(Schedule.flow(sigmas, 1.0), weighting=weighting)
    expected = compute_loss_weighting_for_sd3(weighting, sigmas)
    torch.testing.assert_close(torch.ones_like(sigmas) if weights is None else weights, expected)
    assert (weights is None) == (weighting == "none")


def test_weights_for_the_other_kind_of_model_are_refused() -> None:
    diffusion = Schedule.diffusion(torch.tensor([0.9, 0.1]), "epsilon", 1.0)
    flow = Schedule.flow(torch.tensor([0.1, 0.9]), 1.0)
    with pytest.raises(RefusedInput, match="snr_gamma is for models that predict noise or velocity"):
        weights_of(flow, snr_gamma=5.0)
    with pytest.raises(RefusedInput, match="loss_weighting cosmap is for models of flow matching"):
        weights_of(diffusion, weighting="cosmap")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"logit_mean": 1.0}, "logit_mean is for timestep_sampling logit-normal, got 1 with model: drop one"),
        ({"mode_scale": 0.5, "timestep_sampling": "shifted"}, "mode_scale is for timestep_sampling mode, got 0.5 wi"),
        ({"sigma_shift": 2.0}, "sigma_shift is for timestep_sampling shifted, got 2 with model"),
        ({"sigma_shift": 0.0, "timestep_sampling": "shifted"}, "sigma_shift must be above 0, got 0.0"),
        ({"mode_scale": 2.0, "timestep_sampling": "mode"}, "mode_scale must be at least -1 and below 1.75, got 2.0"),
        ({"snr_gamma": 5.0, "loss_weighting": "cosmap"}, "snr_gamma is for models of diffusion and loss_weighting"),
        ({"snr_gamma": 0.0}, "snr_gamma must be above 0, got 0.0"),
        ({"noise_offset": -0.1}, "noise_offset must be at least 0, got -0.1"),
        ({"caption_dropout": 1.0}, "caption_dropout must be at least 0 and below 1, got 1.0"),
        ({"timestep_sampling": "odd"}, "timestep_sampling must be one of model, uniform"),
    ],
)
def test_settings_of_the_objective_are_checked(settings: dict[str, Any], message: str) -> None:
    config = TextualInversionConfig(instance_data_dir="images", initializer_token="mug", **settings)
    (problem,) = problems(config)
    assert problem.startswith(message)
