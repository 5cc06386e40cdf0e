"""The weights of the step with the lowest L_det of a launched script."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dvar.errors import RefusedInput
from dvar.files import read_json, staged_folder, write_json
from dvar.stopping.probe import preserve_state

FOLDER, STEP_FILE, WEIGHTS = "dvar-best", "step.json", "weights.safetensors"


class BestWeights:
    """A copy of the trained weights at the step with the lowest L_det, in main memory until the script ends.

    Args:
        accelerator: The accelerator of the script.
        parent: The folder in which `FOLDER` is written.
        resumed: Whether the script is resumed, so that the folder of the part before may be replaced by a better step.

    Attributes:
        step: The step of the copy; None before the first.
        value: The lowest L_det so far, of the weights that there are: a part that was killed has saved none.
    """

    def __init__(self, accelerator: Any, parent: Path, *, resumed: bool) -> None:
        self._accelerator, self.folder = accelerator, parent / FOLDER
        if self.folder.exists() and not resumed:
            raise RefusedInput(f"dvar_keep_best writes the new folder {self.folder}, which exists: move it away")
        self.step: int | None = None
        self.value = math.inf
        with contextlib.suppress(OSError, ValueError):  # there is no such file, or it says nothing
            self.value = float(read_json(self.folder / STEP_FILE, {"L_det": float})["L_det"])
        self._copies: list[Tensor] = []

    def consider(self, step: int, value: float) -> None:
        """Copy the trained weights if L_det is finite and lower than ever."""
        if math.isfinite(value) and value < self.value and self._accelerator.is_main_process:
            self._copies = [weight.detach().to("cpu", copy=True) for _, weight in self._trained_weights()]
            self.step, self.value = step, value

    def save(self) -> Path | None:
        """Write the copy as the script writes its checkpoints, and return the folder; None where there is no copy.

        The script's own hook for saving gets the best weights, if it has one; otherwise they are written by their
        names. The weights of the script are then what they were.
        """
        if self.step is None:
            return None
        weights = [weight for _, weight in self._trained_weights()]
        last = [weight.detach().clone() for weight in weights]
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with preserve_state([]), torch.no_grad(), staged_folder(self.folder) as folder:
            try:
                for weight, copy in zip(weights, self._copies, strict=True):
                    weight.copy_(copy)
                self._write(folder)
            finally:
                for weight, copy in zip(weights, last, strict=True):
                    weight.copy_(copy)
            write_json(folder / STEP_FILE, {"step": self.step, "L_det": self.value})
        return self.folder

    def _write(self, folder: Path) -> None:
        accelerator = self._accelerator
        hooks = list(accelerator._save_model_state_pre_hook.values())
        if hooks:
            states = [accelerator.get_state_dict(model, unwrap=False) for model in accelerator._models]
            for hook in hooks:
                hook(accelerator._models, states, str(folder))
        if not any(folder.iterdir()):
            save_file({name: weight.contiguous() for name, weight in self._trained_weights()}, folder / WEIGHTS)

    def _trained_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Return the weights that the script's optimizers train, each once, by their names."""
        models = [self._accelerator.unwrap_model(model) for model in self._accelerator._models]
        names = {
            id(weight): name if len(models) == 1 else f"{index}.{name}"
            for index, model in enumerate(models)
            for name, weight in model.named_parameters()
        }
        groups = (group for optimizer in self._accelerator._optimizers for group in optimizer.param_groups)
        weights = {id(weight): weight for group in groups for weight in group["params"]}
        return [(names.get(key, f"weight.{place}"), weight) for place, (key, weight) in enumerate(weights.items())]
