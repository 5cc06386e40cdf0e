"""Loading the model of a run with what the run learned."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.source import ModelSource
from dvar.errors import RefusedInput
from dvar.files import read_json, regular_file
from dvar.training.checkpoint import Checkpoint, validate_run_facts
from dvar.training.methods.registry import build_method, config_from_dict
from dvar.training.packages import quantize_problems
from dvar.training.run_layout import CONFIG, RESULT, WEIGHTS, checkpoint_name
from dvar.training.run_schemas import RESULT as RESULT_SCHEMA


def load_personalised_backbone(folder: str | Path, *, step: int | None = None, **options: Any) -> Backbone:
    """Return the base model of a run with what the run learned.

    Warns when the base model is not the one that the run was trained on.

    Args:
        folder: Folder of the run.
        step: The step whose checkpoint is loaded, also of an unfinished run; the exported weights of a finished run by
            default.
        options: Passed to `Backbone.load`.

    Raises:
        RefusedInput: The folder holds no finished run, or weights that do not fit its config.
        CheckpointError: There is no such checkpoint.
        ModelError: The base model cannot be loaded.
    """
    folder = Path(folder)
    if step is None:
        config, result = load_result(folder)
        digest, files = result["base_sha256"], load_weights(folder, result["weights"])
        weights = {name: tensor for file in files for name, tensor in file.items()}
    else:
        checkpoint = Checkpoint.read(folder / checkpoint_name(step))
        validate_run_facts(checkpoint)
        config, digest, weights = (
            config_from_dict(checkpoint.facts["config"]),
            checkpoint.facts["base"],
            checkpoint.state,
        )
    backbone = load_backbone(ModelSource.of(config), **options)
    if backbone.digest != digest:
        change = f"{config.pretrained_model_name_or_path} is not what {folder} was trained on"
        warnings.warn(f"{change}: its images will differ", stacklevel=2)
    try:
        build_method(config, backbone).load(weights)
    except (KeyError, ValueError, RuntimeError) as error:
        mismatch = f"the weights in {folder} do not fit its {CONFIG} ({error})"
        raise RefusedInput([f"{mismatch}: restore them or train again"]) from error
    return backbone


def loading_options(
    config: TrainingConfig,
    mixed_precision: str | None = None,
    quantize: str | None = None,
    offload: bool | None = None,
) -> dict[str, Any]:
    """Return the options of `Backbone.load` by which the model of a run is loaded as the run itself had it.

    Args:
        config: The config of the run.
        mixed_precision: The arithmetic instead of the run's own.
        quantize: The bits of the denoising network instead of the run's own.
        offload: Whether networks are on the CPU while they are idle, instead of the run's own choice.

    Raises:
        RefusedInput: The weights of this method cannot be quantised, or the package for it is not installed.
    """
    overrides: dict[str, Any] = {"mixed_precision": mixed_precision, "quantize": quantize, "offload": offload}
    changed = replace(config, **{name: value for name, value in overrides.items() if value is not None})
    refusals = [message for names, message in changed.conflicts() if "quantize" in names]
    if problems := refusals or quantize_problems(changed.quantize):
        raise RefusedInput(problems)
    return {name: getattr(changed, name) for name in overrides}


def load_result(folder: str | Path) -> tuple[TrainingConfig, dict[str, Any]]:
    """Return the config and the result of a finished run.

    Raises:
        RefusedInput: The folder holds no finished run, or one whose result lists no weights.
    """
    folder = Path(folder)
    try:
        settings, result = read_json(folder / CONFIG, dict), read_json(folder / RESULT, RESULT_SCHEMA)
        config, weights, _ = config_from_dict(settings), result["weights"], result["base_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise RefusedInput([f"{folder} is no finished run: it must hold {CONFIG} and {RESULT} ({error})"]) from error
    if not isinstance(weights, list) or not weights or not all(_is_weight_file(name) for name in weights):
        message = f"{RESULT} of {folder} must list the run's weight files under weights, got {weights!r}"
        raise RefusedInput([f"{message}: restore it or train again"])
    return config, result


def _is_weight_file(name: Any) -> bool:
    return isinstance(name, str) and "/" not in name and name.startswith(tuple(Path(kind).stem for kind in WEIGHTS))


def load_weights(folder: Path, names: Sequence[str]) -> list[dict[str, Tensor]]:
    """Return the tensors of each of these weight files by name. Only safetensors files are read, never pickles.

    Raises:
        RefusedInput: A file is missing or damaged, or holds a value that is not finite.
    """
    try:
        files = [load_file(regular_file(folder / name)) for name in names]
    except (OSError, SafetensorError) as error:
        raise RefusedInput([f"{folder} lacks its weights or they are damaged ({error}): train again"]) from error
    for name, tensors in zip(names, files, strict=True):
        if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise RefusedInput([f"{folder / name} holds values that are not finite ({broken[0]}): train again"])
    return files
