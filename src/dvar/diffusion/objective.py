"""The training objective of latent diffusion, over draws that are values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from dvar.diffusion.randomness import generator
from dvar.diffusion.timesteps import UNIFORM, Density

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
Choose = Callable[[str, int], int]
"""(factor, count) -> a whole number below ``count``, drawn uniformly by the key of one sample's factor."""


@dataclass(frozen=True)
class Draws:
    """One batch with everything that is random about it.

    Training evaluates the objective on fresh draws and L_det on held ones; a row of the paper's Figure 5 is
    `dataclasses.replace` of one field.

    Attributes:
        moments: Mean and log-variance of the autoencoder's posterior of each image x, float32 [B, 2C, h, w].
        vae_noise: What picks a latent from that posterior, float32 [B, C, h, w].
        noise: The noise epsilon, float32 [B, C, h, w].
        timesteps: The timestep t, int64 [B].
        input_ids: The caption y, int64 [B, L].
        mask: 1 where the image's own latents are and 0 where an augmentation filled up, float32 [B, 1, h, w]; None is
            1 everywhere.

    Source: Section 3.2, a field for each factor.
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

    def split(self, count: int) -> list[Draws]:
        """Return these draws as batches of at most ``count``."""
        parts = {name: torch.split(part, count) for name, part in self._parts().items()}
        return [Draws(**dict(zip(parts, chunk, strict=True))) for chunk in zip(*parts.values(), strict=True)]

    def joined(self, other: Draws) -> Draws:
        """Return these draws and then the ``other`` draws as one batch."""
        masked = self.mask is not None or other.mask is not None
        own, others = (draws._masked() if masked else draws for draws in (self, other))
        return Draws(**{name: torch.cat([part, getattr(others, name)]) for name, part in own._parts().items()})

    def _masked(self) -> Draws:
        """Return the same draws with a mask."""
        count, _, height, width = self.noise.shape
        return self if self.mask is not None else replace(self, mask=self.noise.new_ones(count, 1, height, width))

    def _parts(self) -> dict[str, Tensor]:
        """Return the fields that are not None, by name."""
        return {item.name: part for item in fields(self) if (part := getattr(self, item.name)) is not None}


@dataclass(frozen=True)
class Example:
    """An image and a caption of it, encoded, on the CPU: moments [2C, h, w], input_ids [L], mask [1, h, w] or None."""

    moments: Tensor
    input_ids: Tensor
    mask: Tensor | None = None


class Examples(Protocol):
    """A source of examples that training draws from."""

    def example(self, choose: Choose) -> Example:
        """Return an example; ``choose`` makes every choice in it."""
        ...

    @property
    def all_captions(self) -> Tensor:
        """The captions that an example may have, int64 [n, L]."""
        ...


@dataclass(frozen=True)
class Encoded:
    """The views and the captions of each image, encoded once, on the CPU.

    Attributes:
        moments: float32 [images, views, 2C, h, w], where views are the augmentations (as it is; mirrored).
        captions: For each image an int64 tensor [captions, L].
        order: The images from which one is drawn, each as often as it counts; each once if empty.
    """

    moments: Tensor
    captions: Sequence[Tensor]
    order: Sequence[int] = ()

    def example(self, choose: Choose) -> Example:
        """Return an image in one of its views under one of its captions, each drawn uniformly."""
        place = choose("picture", len(self))
        image = self.order[place] if self.order else place
        view, captions = choose("view", self.moments.shape[1]), self.captions[image]
        return Example(self.moments[image, view], captions[choose("caption", len(captions))])

    @property
    def all_captions(self) -> Tensor:
        """The captions of all images, int64 [n, L]."""
        return torch.cat(list(self.captions))

    def __len__(self) -> int:
        """Return the count of what one is drawn from."""
        return len(self.order) or len(self.moments)


@dataclass(frozen=True)
class Bucketed:
    """Examples of several sizes, of which a batch has one.

    Attributes:
        buckets: The examples of each size.
    """

    buckets: Sequence[Encoded]

    def choose_bucket(self, seed: int, stream: str, step: int, index: int = 0) -> Encoded:
        """Return the bucket of a batch, drawn by its count: every image is as likely as any other."""
        counts = [len(bucket) for bucket in self.buckets]
        place = int(torch.randint(sum(counts), (), generator=generator(seed, f"{stream}/bucket", step, index)))
        return next(bucket for bucket, end in zip(self.buckets, accumulate(counts), strict=True) if place < end)

    def example(self, choose: Choose) -> Example:
        """Return an image of any size; a batch of several has to choose a bucket first."""
        place = choose("bucket", sum(len(bucket) for bucket in self.buckets))
        ends = accumulate(len(bucket) for bucket in self.buckets)
        return next(b for b, end in zip(self.buckets, ends, strict=True) if place < end).example(choose)

    @property
    def all_captions(self) -> Tensor:
        """The captions of all images, int64 [n, L]."""
        return torch.cat([bucket.all_captions for bucket in self.buckets])


@dataclass(frozen=True)
class Schedule:
    """The noise and the target under which a model was trained.

    A noisy latent is z_t = signal_t z_0 + spread_t epsilon; timestep 0 has the least noise.

    Attributes:
        signals: float32 [T].
        spreads: float32 [T].
        times: The model's input for each timestep, [T]: the timestep itself, or 1,000 times sigma.
        prediction_type: "epsilon", "v_prediction", or "flow", whose target is epsilon - z_0.
        scaling_factor: The factor of the autoencoder's latents, of all or of each channel, float32 [C, 1, 1].
        shift_factor: What is subtracted from them before, of all or of each channel.
        density: How training draws timesteps.
    """

    signals: Tensor
    spreads: Tensor
    times: Tensor
    prediction_type: str
    scaling_factor: float | Tensor
    shift_factor: float | Tensor = 0.0
    density: Density = UNIFORM

    @classmethod
    def diffusion(cls, alphas_cumprod: Tensor, prediction_type: str, scaling_factor: float) -> Schedule:
        """Return the schedule of a model of diffusion, from its share of signal at each timestep, float32 [T].

        Source: Equation 1 in the notation of DDPM: z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) epsilon.
        """
        times = torch.arange(len(alphas_cumprod))
        return cls(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt(), times, prediction_type, scaling_factor)

    @classmethod
    def flow(
        cls,
        sigmas: Tensor,
        scaling_factor: float | Tensor,
        shift_factor: float | Tensor = 0.0,
        density: Density = UNIFORM,
    ) -> Schedule:
        """Return the schedule of a model of flow matching, from its noise levels in rising order, float32 [T].

        Source: Esser et al., Scaling Rectified Flow Transformers (2024), Section 3: z_t = (1 - sigma) z_0 + sigma
            epsilon.
        """
        return cls(1 - sigmas, sigmas, 1000 * sigmas, "flow", scaling_factor, shift_factor, density)

    def __len__(self) -> int:
        return len(self.times)


def draw(
    examples: Examples,
    *,
    timesteps: int,
    seed: int,
    stream: str,
    step: int = 0,
    first: int = 0,
    count: int,
    density: Density = UNIFORM,
    noise_offset: float = 0.0,
    caption_dropout: float = 0.0,
    empty_caption: Tensor | None = None,
) -> Draws:
    """Return the draws of samples ``first`` to ``first + count - 1`` of one step, on the CPU.

    Each sample has its own example, its own t in 0 .. ``timesteps`` - 1, and its own two Gaussian noises; each of these
    is keyed by (seed, stream, factor, step, sample), so a step's draws do not depend on how it is split. Of examples of
    several sizes a step has one, drawn by the key of the step.

    Args:
        examples: What is drawn from.
        timesteps: The number of timesteps of the noise schedule.
        seed: The seed of the run.
        stream: The name of the stream, such as "train" or "held".
        step: The step.
        first: The first sample.
        count: The number of samples.
        density: The density of t.
        noise_offset: The deviation of a Gaussian number that is added to all noise of a channel.
        caption_dropout: The chance that a sample has the empty caption.
        empty_caption: The ids of the empty caption, int64 [L].

    Source: Section 2.2, Equations 2 and 3; the held batch of Equation 4 is the same call with its own stream. Offset
        noise: Guttenberg, Diffusion with Offset Noise (2023). Dropped captions: Ho and Salimans, Classifier-Free
        Diffusion Guidance (2022), Algorithm 1.
    Deviates: The released code takes the held batch's images and captions in list order and its t without
        replacement.
    """
    if isinstance(examples, Bucketed):
        examples = examples.choose_bucket(seed, stream, step)
    samples = [_sample(examples, timesteps, density, seed, stream, step, i) for i in range(first, first + count)]
    for index, sample in enumerate(samples, start=first):
        if noise_offset:
            offset = torch.randn(len(sample["noise"]), 1, 1, generator=generator(seed, f"{stream}/offset", step, index))
            sample["noise"] = sample["noise"] + noise_offset * offset
        if caption_dropout and empty_caption is not None:
            chance = torch.rand((), generator=generator(seed, f"{stream}/dropped", step, index))
            sample["input_ids"] = empty_caption if chance < caption_dropout else sample["input_ids"]
    return Draws(**{name: torch.stack([sample[name] for sample in samples]) for name in samples[0]})


def latents_of(draws: Draws, scaling_factor: float | Tensor, shift_factor: float | Tensor = 0.0) -> Tensor:
    """Return the scaled latents z_0, a sample of each posterior, float32 [B, C, h, w].

    Args:
        draws: The draws.
        scaling_factor: As in `Schedule`.
        shift_factor: As in `Schedule`.

    Source: Section 2.2, z_0 = E(x). The log-variance is clamped to [-30, 20], as in diffusers' autoencoder.
    """
    scaling_factor, shift_factor = (
        part.to(draws.moments.device) if isinstance(part, Tensor) else part for part in (scaling_factor, shift_factor)
    )
    mean, log_variance = draws.moments.chunk(2, dim=1)
    sample = mean + torch.exp(0.5 * log_variance.clamp(-30, 20)) * draws.vae_noise
    return scaling_factor * (sample - shift_factor)


def denoising_loss(predict: Predict, draws: Draws, schedule: Schedule) -> Tensor:
    """Return the loss of each sample, float32 [B]: the mean squared error of the prediction, computed in float32.

    Args:
        predict: The model, called with (z_t, times of t, input_ids).
        draws: The draws, on the model's device.
        schedule: The model's noise schedule.

    Source: Equations 2 and 4, ||epsilon - epsilon_theta(z_t(E(x), epsilon), c(y), t)||^2; for
        v-prediction the target is sqrt(a_t) epsilon - sqrt(1 - a_t) z_0, for flow matching epsilon - z_0.
    Deviates: It is the mean over the latent's elements, as in all code, where the equations write the sum; it is not
        summed over the batch, so that each input can be followed by itself. With a mask it is the mean over the
        elements in it.
    """
    latents = latents_of(draws, schedule.scaling_factor, schedule.shift_factor)
    signal, spread = (
        part.to(latents.device)[draws.timesteps].reshape(-1, 1, 1, 1) for part in (schedule.signals, schedule.spreads)
    )
    targets = {
        "epsilon": lambda: draws.noise,
        "v_prediction": lambda: signal * draws.noise - spread * latents,
        "flow": lambda: draws.noise - latents,
    }
    times = schedule.times.to(latents.device)[draws.timesteps]
    predicted = predict(signal * latents + spread * draws.noise, times, draws.input_ids)
    target = targets[schedule.prediction_type]()
    errors, elements = (predicted - target).square(), (1, 2, 3)
    if draws.mask is None:
        return errors.mean(dim=elements)
    return (errors * draws.mask).sum(dim=elements) / (draws.mask.sum(dim=elements) * errors.shape[1])


def _sample(
    examples: Examples, timesteps: int, density: Density, seed: int, stream: str, step: int, index: int
) -> dict[str, Tensor]:
    """Return the draws of one sample, by the name of the field."""

    def choose(factor: str, count: int) -> int:
        return int(torch.randint(count, (), generator=generator(seed, f"{stream}/{factor}", step, index)))

    def gaussian(factor: str) -> Tensor:
        return torch.randn(shape, generator=generator(seed, f"{stream}/{factor}", step, index))

    def timestep() -> int:
        if density.kind == "uniform":
            return choose("timestep", timesteps)
        place = density.draw(generator(seed, f"{stream}/timestep", step, index))
        return min(int(timesteps * place), timesteps - 1)

    example = examples.example(choose)
    channels, height, width = example.moments.shape
    shape = (channels // 2, height, width)
    parts = {
        "moments": example.moments,
        "vae_noise": gaussian("vae"),
        "noise": gaussian("noise"),
        "timesteps": torch.tensor(timestep()),
        "input_ids": example.input_ids,
    }
    return parts if example.mask is None else {**parts, "mask": example.mask}
