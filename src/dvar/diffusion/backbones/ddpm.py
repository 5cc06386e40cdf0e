"""What the backbones of diffusion share: noise or velocity under the noise schedule of DDPM."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from dvar.diffusion.backbones.stock import StockBackbone
from dvar.diffusion.objective import Schedule
from dvar.errors import ModelError


class DiffusionBackbone(StockBackbone):
    """A backbone whose model predicts noise or velocity under the noise schedule of DDPM."""

    def check(self, name: str | Path) -> None:
        """Raise a `ModelError` if the model predicts something else, and as its base class does."""
        super().check(name)
        if (kind := self.scheduler.config.prediction_type) not in ("epsilon", "v_prediction"):
            raise ModelError(
                f"the model must predict epsilon or v_prediction, {name} predicts {kind}: choose another model"
            )

    @property
    def noise(self) -> Tensor:
        """The share of signal at each timestep, [T]."""
        alphas_cumprod: Tensor = self.scheduler.alphas_cumprod
        return alphas_cumprod

    @property
    def schedule(self) -> Schedule:
        """The noise and the target under which it was trained: those of its own scheduler."""
        return Schedule.diffusion(
            self.noise.float().cpu(), self.scheduler.config.prediction_type, self.vae.config.scaling_factor
        )
