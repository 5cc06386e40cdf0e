"""The settings of the training objective: which timesteps are drawn, how they weigh, what is dropped or shifted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from dvar.config.fields import NOT_NEGATIVE, POSITIVE, Config, Range, setting

TimestepSampling = Literal["model", "uniform", "logit-normal", "mode", "shifted"]
LossWeighting = Literal["none", "sigma_sqrt", "cosmap"]
_OWNERS = {"logit_mean": "logit-normal", "logit_std": "logit-normal", "mode_scale": "mode", "sigma_shift": "shifted"}


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Config):
    """The settings of the training objective; by default it is the paper's, or that of the model's own training.

    L_det is measured without weights, dropped captions and shifted noise, so that it means the same with every setting.

    Source: `dvar.diffusion.timesteps` and `dvar.diffusion.objective` name the source of each.
    """

    timestep_sampling: TimestepSampling = setting(
        "model",
        "How training draws timesteps: 'model' is logit-normal for Stable Diffusion 3 and uniform for all others.",
        section="Objective",
    )
    logit_mean: float = setting(0.0, "Mean of logit-normal timesteps; above 0 there is more noise.", Range(-10, 10))
    logit_std: float = setting(1.0, "Deviation of logit-normal timesteps.", POSITIVE)
    mode_scale: float = setting(1.29, "How much timesteps of 'mode' keep to the middle.", Range(-1, 1.75))
    sigma_shift: float = setting(
        3.0,
        "How much 'shifted' timesteps keep to the noise, beyond a shift of the scheduler's own; 1 is not at all.",
        POSITIVE,
    )
    loss_weighting: LossWeighting = setting(
        "none", "Weight of a noise level sigma in flow matching: 1, sigma^-2, or 2 / (pi (1 - 2 sigma + 2 sigma^2))."
    )
    snr_gamma: float | None = setting(
        None, "Min-SNR-gamma weights, for diffusion, not flow matching; 5 is usual, none by default.", POSITIVE
    )
    noise_offset: float = setting(
        0.0, "Standard deviation of a constant added to the noise of each channel, such as 0.1.", NOT_NEGATIVE
    )
    caption_dropout: float = setting(0.0, "Share of instance images that are shown with an empty caption.", Range(0, 1))


def objective_conflicts(config: ObjectiveConfig) -> Iterator[tuple[set[str], str]]:
    """Yield what is wrong with the settings of the objective together."""
    for name, owner in _OWNERS.items():
        value, default = getattr(config, name), getattr(ObjectiveConfig, name)
        if value != default and config.timestep_sampling != owner:
            message = f"{name} is for timestep_sampling {owner}, got {value:g} with {config.timestep_sampling}"
            yield {name, "timestep_sampling"}, f"{message}: drop one of them"
    if config.snr_gamma and config.loss_weighting != "none":
        message = f"snr_gamma is for models of diffusion and loss_weighting for flow matching, got {config.snr_gamma:g}"
        yield {"snr_gamma", "loss_weighting"}, f"{message} and {config.loss_weighting}: drop one of them"
