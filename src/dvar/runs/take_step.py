"""An earlier step of a finished run made its result."""

from __future__ import annotations

import shutil
from pathlib import Path

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.source import ModelSource
from dvar.errors import RefusedInput
from dvar.files import remove, staged_file, write_json
from dvar.locks import lock_folder
from dvar.runs.load_model import load_result, loading_options
from dvar.runs.run_folder import RunFolder
from dvar.training.checkpoint import Checkpoint, validate_run_facts
from dvar.training.methods.registry import build_method
from dvar.training.model_card import write_model_card
from dvar.training.run_layout import RESULT, at_step, checkpoint_name, checkpoint_paths, checkpoint_step
from dvar.training.weight_files import provenance, split_by_token, write_weights


def take_step(folder: Path, step: int) -> tuple[Path, ...]:
    """Make the weights of a step's checkpoint those that a finished run exports, and return their paths.

    The weights that it exported before stay beside them, with their step in the name. ``result.json`` is away while the
    files change, so that a run that is killed here is one that can be resumed.

    Args:
        folder: Folder of a finished run.
        step: A step with a checkpoint.

    Raises:
        RefusedInput: The run has not finished, another process writes it, it has no such checkpoint, or its base model
            has changed.
        CheckpointError: The checkpoint is damaged.
        ModelError: The base model cannot be loaded.
    """
    with lock_folder(folder):
        config, result = load_result(folder)
        exported = int(result["exported_step"])
        if step == exported:
            return tuple(folder / name for name in result["weights"])
        steps = sorted(checkpoint_step(path) for path in checkpoint_paths(folder))
        if step not in steps:
            listed = ", ".join(map(str, steps)) or "none"
            raise RefusedInput([f"--step must be a step with a checkpoint, {listed} in {folder}, got {step}: name one"])
        checkpoint = Checkpoint.read(folder / checkpoint_name(step))
        validate_run_facts(checkpoint)
        backbone = load_backbone(ModelSource.of(config), **loading_options(config))
        if backbone.digest != checkpoint.facts["base"]:
            message = f"{config.pretrained_model_name_or_path} is not the base model that {folder} was trained on"
            raise RefusedInput([f"{message}: restore it"])
        method = build_method(config, backbone)
        method.load(checkpoint.state)
        files = split_by_token(method.files(method.state))
        run = RunFolder.open(folder)
        verdict = run.verdict
        earlier = {name: at_step(name, exported) for name in result["weights"]}
        for name, saved in earlier.items():
            with staged_file(folder / saved) as staged:
                shutil.copyfile(folder / name, staged)
        remove(folder / RESULT)
        metadata = {**provenance(config, backbone.digest, step), **method.metadata}
        for name, tensors in files.items():
            write_weights(folder / name, tensors, metadata)
        best = [earlier.get(name, name) for name in result.get("best_weights", ())]
        write_model_card(folder, config, verdict, run.samples.get(step, ()), [*files], backbone.title)
        write_json(folder / RESULT, {**result, "exported_step": step, "weights": [*files], "best_weights": best})
        return tuple(folder / name for name in files)
