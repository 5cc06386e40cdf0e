"""The training objective of latent diffusion, written once, over draws that are values.

Training evaluates it on fresh draws, L_det on held ones; a row of the paper's Figure 5 is `dataclasses.replace` of
one field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dvar.diffusion.randomness import generator

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Draws:
    """One batch with everything that is random about it, a field for each factor of the paper's Section 3.2.

    ``moments`` [B, 2C, h, w] float32: mean and log-variance of the autoencoder's posterior of each picture x;
    ``vae_noise`` [B, C, h, w] float32: what picks a latent from that posterior; ``noise`` [B, C, h, w] float32:
    epsilon; ``timesteps`` [B] int64: t; ``input_ids`` [B, L] int64: the caption y.
    """

    moments: Tensor
    vae_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor

    def to(self, device: torch.device | str) -> Draws:
        """Return the same draws on ``device``."""
        return Draws(**{item.name: getattr(self, item.name).to(device) for item in fields(self)})

    def joined(self, other: Draws) -> Draws:
        """Return these draws and then the ``other`` ones as one batch."""
        pairs = {item.name: [getattr(self, item.name), getattr(other, item.name)] for item in fields(self)}
        return Draws(**{name: torch.cat(pair) for name, pair in pairs.items()})


@dataclass(frozen=True)
class Examples:
    """All that can be drawn from: each picture's views and each picture's captions, already encoded, on the CPU.

    ``moments`` [pictures, views, 2C, h, w] float32, where views are the augmentations (as it is; mirrored);
    ``captions``: for each picture an int64 tensor [captions, L].
    """

    moments: Tensor
    captions: Sequence[Tensor]


@dataclass(frozen=True)
class Schedule:
    """What a model was trained to predict and under how much noise.

    ``alphas_cumprod`` [T] float32; ``prediction_type`` is "epsilon" or "v_prediction"; ``scaling_factor`` multiplies
    latents.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    scaling_factor: float


def draw(
    examples: Examples, *, timesteps: int, seed: int, stream: str, step: int = 0, first: int = 0, count: int
) -> Draws:
    """Return the draws of samples ``first`` to ``first + count - 1`` of one step, on the CPU.

    Each sample has its own picture, view, caption and t, all uniform (t in 0 .. ``timesteps`` - 1), and its own two
    Gaussian noises; each of these is keyed by (seed, stream, factor, step, sample), so a step's draws do not depend
    on how it is split.

    Source: Section 2.2, Equations 2 and 3; the held batch of Equation 4 is the same call with a stream of its own.
    Deviates: the released code takes the held batch's pictures and captions in list order and its t without
    replacement.
    """
    samples = [_sample(examples, timesteps, seed, stream, step, index) for index in range(first, first + count)]
    moments, vae_noise, noise, drawn, input_ids = (torch.stack(column) for column in zip(*samples, strict=True))
    return Draws(moments, vae_noise, noise, drawn, input_ids)


def latents_of(draws: Draws, scaling_factor: float) -> Tensor:
    """Return the scaled latents z_0 [B, C, h, w] that the draws name: a sample of each posterior.

    Source: Section 2.2, z_0 = E(x).  The log-variance is held in [-30, 20], as diffusers' autoencoder does.
    """
    mean, log_variance = draws.moments.chunk(2, dim=1)
    return scaling_factor * (mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * draws.vae_noise)


def denoising_loss(predict: Predict, draws: Draws, schedule: Schedule) -> Tensor:
    """Return the loss of each sample, float32 [B]: the mean squared error of the prediction, computed in float32.

    ``predict(z_t, t, input_ids)`` is the model; everything must be on one device.

    Source: Equations 2 and 4, ||epsilon - epsilon_theta(z_t(E(x), epsilon), c(y), t)||^2; v-prediction: its target is
    sqrt(a_t) epsilon - sqrt(1 - a_t) z_0.
    Deviates: the mean over the latent's elements, as all code does, where the equations write the sum; it is not summed
    over the batch, so that each input can be followed by itself.
    """
    latents = latents_of(draws, schedule.scaling_factor)
    kept = schedule.alphas_cumprod.to(latents.device)[draws.timesteps].reshape(-1, 1, 1, 1)
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    noisy = signal * latents + spread * draws.noise
    target = draws.noise if schedule.prediction_type == "epsilon" else signal * draws.noise - spread * latents
    predicted = predict(noisy, draws.timesteps, draws.input_ids)
    return (predicted - target).square().mean(dim=(1, 2, 3))


def _sample(examples: Examples, timesteps: int, seed: int, stream: str, step: int, index: int) -> tuple[Tensor, ...]:
    def choose(factor: str, count: int) -> Tensor:
        return torch.randint(count, (), generator=generator(seed, f"{stream}/{factor}", step, index))

    def gaussian(factor: str) -> Tensor:
        return torch.randn(shape, generator=generator(seed, f"{stream}/{factor}", step, index))

    pictures, views, channels, height, width = examples.moments.shape
    shape = (channels // 2, height, width)
    picture = int(choose("picture", pictures))
    captions = examples.captions[picture]
    return (
        examples.moments[picture, int(choose("view", views))],
        gaussian("vae"),
        gaussian("noise"),
        choose("timestep", timesteps),
        captions[int(choose("caption", len(captions)))],
    )
