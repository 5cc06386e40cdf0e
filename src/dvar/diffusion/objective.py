"""The training objective of latent diffusion, written once, over draws that are values.

Training evaluates it on fresh draws, L_det on held ones; a row of the paper's Figure 5 is `dataclasses.replace` of
one field.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import torch
from torch import Tensor

from dvar.diffusion.randomness import generator

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Choose = Callable[[str, int], int]
"""(factor, count) -> a whole number below ``count``, drawn evenly by the key of one sample's factor."""


@dataclass(frozen=True)
class Draws:
    """One batch with everything that is random about it, a field for each factor of the paper's Section 3.2.

    ``moments`` [B, 2C, h, w] float32: mean and log-variance of the autoencoder's posterior of each picture x;
    ``vae_noise`` [B, C, h, w] float32: what picks a latent from that posterior; ``noise`` [B, C, h, w] float32:
    epsilon; ``timesteps`` [B] int64: t; ``input_ids`` [B, L] int64: the caption y.  ``mask`` [B, 1, h, w] float32, 1
    where the picture's own latents are and 0 where an augmentation filled up; None: 1 everywhere.
    """

    moments: Tensor
    vae_noise: Tensor
    noise: Tensor
    timesteps: Tensor
    input_ids: Tensor
    mask: Tensor | None = None

    def to(self, device: torch.device | str) -> Draws:
        """Return the same draws on ``device``."""
        return Draws(**{name: part.to(device) for name, part in self._parts().items()})

    def joined(self, other: Draws) -> Draws:
        """Return these draws and then the ``other`` ones as one batch."""
        masked = self.mask is not None or other.mask is not None
        own, others = (draws._masked() if masked else draws for draws in (self, other))
        return Draws(**{name: torch.cat([part, getattr(others, name)]) for name, part in own._parts().items()})

    def _masked(self) -> Draws:
        count, _, height, width = self.noise.shape
        return self if self.mask is not None else replace(self, mask=self.noise.new_ones(count, 1, height, width))

    def _parts(self) -> dict[str, Tensor]:
        return {item.name: part for item in fields(self) if (part := getattr(self, item.name)) is not None}


@dataclass(frozen=True)
class Example:
    """A picture and a caption of it, encoded, on the CPU: moments [2C, h, w], input_ids [L], mask [1, h, w] or None."""

    moments: Tensor
    input_ids: Tensor
    mask: Tensor | None = None


class Examples(Protocol):
    """All that can be drawn from; each choice that an example takes is made by ``choose``."""

    def example(self, choose: Choose) -> Example: ...


@dataclass(frozen=True)
class Encoded:
    """Each picture's views and each picture's captions, encoded once, on the CPU.

    ``moments`` [pictures, views, 2C, h, w] float32, where views are the augmentations (as it is; mirrored);
    ``captions``: for each picture an int64 tensor [captions, L].
    """

    moments: Tensor
    captions: Sequence[Tensor]

    def example(self, choose: Choose) -> Example:
        """Return a picture in one of its views under one of its captions, all even."""
        picture = choose("picture", len(self.moments))
        view, captions = choose("view", self.moments.shape[1]), self.captions[picture]
        return Example(self.moments[picture, view], captions[choose("caption", len(captions))])


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

    Each sample has its own example, its own t, even in 0 .. ``timesteps`` - 1, and its own two Gaussian noises; each
    of these is keyed by (seed, stream, factor, step, sample), so a step's draws do not depend on how it is split.

    Source: Section 2.2, Equations 2 and 3; the held batch of Equation 4 is the same call with a stream of its own.
    Deviates: the released code takes the held batch's pictures and captions in list order and its t without
    replacement.
    """
    samples = [_sample(examples, timesteps, seed, stream, step, index) for index in range(first, first + count)]
    return Draws(**{name: torch.stack([sample[name] for sample in samples]) for name in samples[0]})


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
    over the batch, so that each input can be followed by itself.  With a mask it is the mean over the elements in it.
    """
    latents = latents_of(draws, schedule.scaling_factor)
    kept = schedule.alphas_cumprod.to(latents.device)[draws.timesteps].reshape(-1, 1, 1, 1)
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    noisy = signal * latents + spread * draws.noise
    target = draws.noise if schedule.prediction_type == "epsilon" else signal * draws.noise - spread * latents
    predicted = predict(noisy, draws.timesteps, draws.input_ids)
    errors, every = (predicted - target).square(), (1, 2, 3)
    if draws.mask is None:
        return errors.mean(dim=every)
    return (errors * draws.mask).sum(dim=every) / (draws.mask.sum(dim=every) * errors.shape[1])


def _sample(examples: Examples, timesteps: int, seed: int, stream: str, step: int, index: int) -> dict[str, Tensor]:
    def choose(factor: str, count: int) -> int:
        return int(torch.randint(count, (), generator=generator(seed, f"{stream}/{factor}", step, index)))

    def gaussian(factor: str) -> Tensor:
        return torch.randn(shape, generator=generator(seed, f"{stream}/{factor}", step, index))

    example = examples.example(choose)
    channels, height, width = example.moments.shape
    shape = (channels // 2, height, width)
    drawn = {
        "moments": example.moments,
        "vae_noise": gaussian("vae"),
        "noise": gaussian("noise"),
        "timesteps": torch.tensor(choose("timestep", timesteps)),
        "input_ids": example.input_ids,
    }
    return drawn if example.mask is None else {**drawn, "mask": example.mask}
