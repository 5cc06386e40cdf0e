"""Loads the model of a finished run, with what the run learned."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvar.config.training import AnyConfig, restored
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.tokens import model_path
from dvar.errors import RefusedInput
from dvar.training.checkpoint import Checkpoint
from dvar.training.run import assembled
from dvar.training.run_layout import RESULT


def finished(folder: str | Path) -> tuple[AnyConfig, dict[str, Any]]:
    """Return the settings of a finished run and what its result.json tells.

    Raises: RefusedInput when the folder holds no finished run.
    """
    folder = Path(folder)
    try:
        config, result = (json.loads((folder / name).read_text(encoding="utf-8")) for name in ("config.json", RESULT))
        return restored(config), result
    except (OSError, ValueError) as error:
        raise RefusedInput([f"{folder} is no finished run: it must hold config.json and {RESULT} ({error})"]) from error


def personalised(folder: str | Path, *, step: int | None = None, **loading: Any) -> Backbone:
    """Return the model of a finished run with what was learned; ``loading`` goes to `Backbone.load`.

    With a ``step`` it is what was learned by then, from the checkpoint of that step; the run need not have finished.
    Warns when the base model is no longer the one that was trained on.

    Raises: RefusedInput when the folder holds no finished run; CheckpointError when it has no such checkpoint;
    ModelError.
    """
    folder = Path(folder)
    if step is None:
        config, result = finished(folder)
        base, files = result["base_sha256"], read_weights(folder, result["weights"])
        learned = {name: tensor for file in files for name, tensor in file.items()}
    else:
        checkpoint = Checkpoint.read(folder / f"checkpoint-{step}")
        config, base, learned = restored(checkpoint.facts["config"]), checkpoint.facts["base"], checkpoint.state
    backbone = Backbone.load(model_path(config.pretrained_model_name_or_path), **loading)
    if backbone.digest != base:
        said = f"{config.pretrained_model_name_or_path} is not what {folder} was trained on"
        warnings.warn(f"{said}: its pictures will differ", stacklevel=2)
    try:
        assembled(config, backbone).load(learned)
    except (KeyError, RuntimeError) as error:
        said = f"{folder} holds other weights than its config.json tells of ({error})"
        raise RefusedInput([f"{said}: restore them or train again"]) from error
    return backbone


def read_weights(folder: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return what is in each of these weight files of a finished run.

    Raises: RefusedInput when one is missing, or is no whole safetensors file; a pickle is never read.
    """
    try:
        return [load_file(folder / name) for name in names]
    except (OSError, SafetensorError) as error:
        raise RefusedInput([f"{folder} lacks its weights or they are damaged ({error}): train again"]) from error
