"""The denoising loss and its draws."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dvar.diffusion.objective import Draws, Encoded, Schedule, denoising_loss, draw, latents_of

STREAM: dict[str, Any] = {"timesteps": 1000, "seed": 5, "stream": "train"}


@pytest.fixture(scope="module")
def examples() -> Encoded:
    moments = torch.randn(3, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = [torch.arange(20 * index, 20 * index + 12).reshape(4, 3) for index in range(3)]
    return Encoded(moments, captions)


@pytest.fixture(scope="module")
def scheduler() -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def equal_draws(first: Draws, second: Draws) -> bool:
    pairs = [(getattr(first, item.name), getattr(second, item.name)) for item in fields(Draws)]
    return all(left is right if left is None else torch.equal(left, right) for left, right in pairs)


@given(step=st.integers(0, 9999), count=st.integers(1, 12), data=st.data())
def test_draws_do_not_depend_on_how_a_step_is_split(
    examples: Encoded, step: int, count: int, data: st.DataObject
) -> None:
    draws = draw(examples, **STREAM, step=step, first=0, count=count)
    cut = data.draw(st.integers(1, count))
    parts = [draw(examples, **STREAM, step=step, first=0, count=cut)]
    if cut < count:
        parts.append(draw(examples, **STREAM, step=step, first=cut, count=count - cut))
    assert equal_draws(draws, parts[0].joined(parts[1]) if cut < count else parts[0])


def test_draws_differ_between_steps_streams_and_seeds(examples: Encoded) -> None:
    draws = draw(examples, **STREAM, step=1, first=0, count=4)
    assert equal_draws(draws, draw(examples, **STREAM, step=1, first=0, count=4))
    changes: tuple[dict[str, Any], ...] = ({"step": 2}, {"step": 1, "stream": "held"}, {"step": 1, "seed": 6})
    for change in changes:
        other_draws = draw(examples, **{**STREAM, **change}, first=0, count=4)
        assert not torch.equal(other_draws.noise, draws.noise)
        assert not torch.equal(other_draws.vae_noise, draws.vae_noise)
    assert not torch.equal(draws.noise, draws.vae_noise)


def test_samples_of_a_step_share_neither_noise_nor_timestep(examples: Encoded) -> None:
    draws = draw(examples, **STREAM, step=1, first=0, count=64)
    for noise in (draws.noise, draws.vae_noise):
        assert len({tuple(sample.flatten().tolist()) for sample in noise}) == 64
    assert len({*draws.timesteps.tolist()}) > 32


def test_draws_are_the_same_in_every_version(examples: Encoded) -> None:
    """A resumed run, and one that is recorded again, draws what an earlier version drew: the values of version 0.1."""
    draws = draw(examples, **STREAM, step=7, first=0, count=4)
    assert draws.timesteps.tolist() == [918, 828, 890, 418]
    assert draws.input_ids[:, 0].tolist() == [49, 49, 3, 40]
    views = [(2, 1), (2, 0), (0, 1), (2, 1)]
    assert all(torch.equal(image, examples.moments[view]) for image, view in zip(draws.moments, views, strict=True))
    torch.testing.assert_close(
        draws.noise[:, 0, 0, 0], torch.tensor([0.9363, -0.8225, -1.4557, 0.9933]), rtol=0, atol=1e-4
    )
    torch.testing.assert_close(
        draws.vae_noise[:, 0, 0, 0], torch.tensor([-1.1537, 0.0671, 0.2306, 0.7197]), rtol=0, atol=1e-4
    )


def test_images_views_captions_and_timesteps_are_drawn_uniformly(examples: Encoded) -> None:
    draws = draw(examples, timesteps=10, seed=0, stream="train", first=0, count=3000)
    # With n = 3000 and chance p a count has mean np and deviation sqrt(np(1 - p)); six deviations never happen.
    for counts, chance in (
        (torch.bincount(draws.timesteps, minlength=10), 1 / 10),
        (torch.bincount(draws.input_ids[:, 0], minlength=60)[[0, 3, 6, 9, 20, 23, 26, 29, 40, 43, 46, 49]], 1 / 12),
    ):
        assert counts.sum() == 3000
        assert (counts - 3000 * chance).abs().max() < 6 * (3000 * chance * (1 - chance)) ** 0.5
    views = {tuple(moments.flatten()[:2].tolist()) for moments in draws.moments}
    assert len(views) == 3 * 2


def test_an_image_is_drawn_with_its_own_captions(examples: Encoded) -> None:
    draws = draw(examples, **STREAM, step=0, first=0, count=64)
    for moments, ids in zip(draws.moments, draws.input_ids, strict=True):
        index = int(ids[0]) // 20
        assert any(torch.equal(moments, view) for view in examples.moments[index])


def test_latents_are_a_sample_of_the_autoencoder(examples: Encoded) -> None:
    draws = draw(examples, **STREAM, step=0, first=0, count=4)
    draws = replace(draws, moments=draws.moments * 40)  # far enough for the log-variance to meet both its bounds
    posterior = DiagonalGaussianDistribution(draws.moments)
    expected = 0.18215 * (posterior.mean + posterior.std * draws.vae_noise)
    assert torch.equal(latents_of(draws, 0.18215), expected)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_noisy_input_and_the_target_are_those_of_diffusers(
    examples: Encoded, scheduler: DDPMScheduler, kind: str
) -> None:
    draws = draw(examples, **STREAM, step=0, first=0, count=6)
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, kind, 0.18215)
    latents = latents_of(draws, 0.18215)
    target = draws.noise if kind == "epsilon" else scheduler.get_velocity(latents, draws.noise, draws.timesteps)
    arguments: list[Tensor] = []

    def predict(noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        arguments.extend((noisy, timesteps, input_ids))
        return target + torch.arange(1.0, 7).reshape(6, 1, 1, 1)

    losses = denoising_loss(predict, draws, schedule)
    torch.testing.assert_close(arguments[0], scheduler.add_noise(latents, draws.noise, draws.timesteps))
    assert torch.equal(arguments[1], draws.timesteps)
    assert torch.equal(arguments[2], draws.input_ids)
    # The prediction is off by k everywhere in sample k, so its mean squared error is k^2.
    torch.testing.assert_close(losses, torch.arange(1.0, 7) ** 2, rtol=1e-5, atol=1e-5)


def test_losses_are_float32_under_a_prediction_in_half_precision(examples: Encoded, scheduler: DDPMScheduler) -> None:
    draws = draw(examples, **STREAM, step=0, first=0, count=2)
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, "epsilon", 1.0)
    losses = denoising_loss(lambda noisy, *_: torch.zeros_like(noisy, dtype=torch.bfloat16), draws, schedule)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, draws.noise.square().mean(dim=(1, 2, 3)))


def test_the_loss_under_a_mask_is_the_mean_over_its_elements(examples: Encoded, scheduler: DDPMScheduler) -> None:
    plain_draws = draw(examples, **STREAM, step=0, first=0, count=3)
    mask = torch.zeros(3, 1, 4, 4)
    mask[0, 0, 1, 2] = mask[1, 0, :2] = 1
    mask[2] = 1
    error = torch.arange(3.0 * 4 * 4 * 4).reshape(3, 4, 4, 4) / 50
    schedule = Schedule.diffusion(scheduler.alphas_cumprod, "epsilon", 1.0)

    def losses(draws: Draws) -> Tensor:
        return denoising_loss(lambda *_: draws.noise + error, draws, schedule)

    masked_losses = losses(replace(plain_draws, mask=mask))
    expected = [error[0, :, 1, 2].square().mean(), error[1, :, :2].square().mean(), error[2].square().mean()]
    torch.testing.assert_close(masked_losses, torch.stack(expected))
    torch.testing.assert_close(masked_losses[2], losses(plain_draws)[2])
    assert not torch.isclose(masked_losses[:2], losses(plain_draws)[:2]).any()


def test_draws_without_a_mask_are_joined_to_masked_ones_with_a_full_mask(examples: Encoded) -> None:
    plain = draw(examples, **STREAM, step=0, first=0, count=2)
    masked = replace(plain, mask=torch.zeros(2, 1, 4, 4))
    assert plain.joined(plain).mask is None
    for union, expected in ((masked.joined(plain), (0, 0, 1, 1)), (plain.joined(masked), (1, 1, 0, 0))):
        assert union.mask is not None
        assert union.mask.shape == (4, 1, 4, 4)
        assert union.mask.mean(dim=(1, 2, 3)).tolist() == list(expected)
    assert masked.to("cpu").mask is not None
