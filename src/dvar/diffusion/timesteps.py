"""Timesteps of training: the densities that they are drawn from, and what each weighs in the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dvar.config.objective import LossWeighting, ObjectiveConfig
from dvar.errors import RefusedInput


@dataclass(frozen=True)
class Density:
    """The density of a timestep's place between the least noise, 0, and the most, 1.

    Attributes:
        kind: "uniform"; "logit-normal", the sigmoid of a Gaussian; "mode", which keeps to the middle or avoids it;
            "shifted", uniform places moved towards the noise.
        mean: The mean of that Gaussian.
        std: Its deviation.
        scale: How much "mode" keeps to the middle, from -1 to 1.75.
        shift: How much "shifted" keeps to the noise.

    Source: Esser et al., Scaling Rectified Flow Transformers (2024), Section 3.1 (logit-normal and mode) and Section
        5.3.2 (the shift), each for the time t, which is the noise.
    Deviates: diffusers' scripts turn the place round, so there a negative mean means more noise.
    """

    kind: Literal["uniform", "logit-normal", "mode", "shifted"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    scale: float = 1.29
    shift: float = 3.0

    def draw(self, generator: torch.Generator) -> float:
        """Return a place, from 0 to 1."""
        if self.kind == "logit-normal":
            return float((self.mean + self.std * torch.randn((), generator=generator)).sigmoid())
        place = float(torch.rand((), generator=generator))
        if self.kind == "mode":
            return 1 - place - self.scale * (math.cos(math.pi * place / 2) ** 2 - 1 + place)
        return self.shift * place / (1 + (self.shift - 1) * place) if self.kind == "shifted" else place


UNIFORM, LOGIT_NORMAL = Density(), Density("logit-normal")


def density_of(config: ObjectiveConfig, default: Density) -> Density:
    """Return the density that ``config`` asks for; ``default`` is that of the model's own training."""
    if config.timestep_sampling == "model":
        return default
    return replace(
        UNIFORM,
        kind=config.timestep_sampling,
        mean=config.logit_mean,
        std=config.logit_std,
        scale=config.mode_scale,
        shift=config.sigma_shift,
    )


def loss_weights(
    signals: Tensor, spreads: Tensor, prediction_type: str, *, snr_gamma: float | None, weighting: LossWeighting
) -> Tensor | None:
    """Return what each timestep weighs in the loss, float32 [T], or None where all weigh 1.

    Args:
        signals: The share of the image at each timestep, as in `Schedule`, float32 [T].
        spreads: The share of the noise.
        prediction_type: What the model predicts.
        snr_gamma: Weigh by min(SNR, gamma) over SNR for a prediction of noise, over SNR + 1 for one of velocity.
        weighting: Weigh the noise levels of flow matching by name.

    Raises:
        RefusedInput: The weights are for the other kind of model.

    Source: Hang et al., Efficient Diffusion Training via Min-SNR Weighting Strategy (2023), Equation 8 and its form for
        velocity; Esser et al. (2024), Section 3.1, for sigma^-2 and cosmap; all as in diffusers' scripts.
    """
    flow = prediction_type == "flow"
    if snr_gamma and flow:
        raise RefusedInput("snr_gamma is for models that predict noise or velocity, not for flow matching: drop it")
    if weighting != "none" and not flow:
        raise RefusedInput(f"loss_weighting {weighting} is for models of flow matching: drop it, or use snr_gamma")
    if snr_gamma:
        ratio = (signals / spreads) ** 2
        if prediction_type == "v_prediction":
            return ratio.clamp(max=snr_gamma) / (ratio + 1)
        return torch.where(ratio > snr_gamma, snr_gamma / ratio, 1.0)
    weights = {"sigma_sqrt": spreads**-2, "cosmap": 2 / (math.pi * (1 - 2 * spreads + 2 * spreads**2))}
    return weights.get(weighting)
