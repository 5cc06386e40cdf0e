"""What the backbones of flow matching share: the velocity from image to noise, over the noise levels of a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dvar.diffusion.backbones.stock import StockBackbone
from dvar.diffusion.objective import Schedule
from dvar.diffusion.timesteps import UNIFORM, Density
from dvar.errors import ModelError


class FlowBackbone(StockBackbone):
    """A backbone whose model predicts noise minus image under the noise levels of its own scheduler.

    Where the scheduler shifts them by the size of the image as it generates, training has the levels before that shift,
    as in diffusers' scripts.

    Attributes:
        density: How training draws noise levels, as diffusers' script of the family does.
    """

    density: ClassVar[Density] = UNIFORM

    def check(self, name: str | Path) -> None:
        """Raise a `ModelError` if the scheduler is not one of flow matching, and as its base class does."""
        super().check(name)
        if not hasattr(self.scheduler, "sigmas") or "shift" not in self.scheduler.config:
            kind = type(self.scheduler).__name__
            raise ModelError(
                f"{name} must have a scheduler of flow matching, it has a {kind}: copy the scheduler's folder again"
            )

    @property
    def noise(self) -> Tensor:
        """The noise levels in rising order, [T]."""
        # The scheduler of a pipeline that has generated an image would have those of its sampling steps.
        sigmas: Tensor = type(self.scheduler).from_config(self.scheduler.config).sigmas
        return sigmas.sort().values

    @property
    def schedule(self) -> Schedule:
        """The noise and the target under which it was trained: those of its own scheduler."""
        config = self.vae.config
        shift = config.shift_factor or 0.0
        return Schedule.flow(self.noise.float().cpu(), config.scaling_factor, shift, self.density)
