"""What a run needs around it, checked before any model loads: its rule, its folders, its packages, one process.

Each check returns every problem it finds, as lines that `dvar.training.dataset.read_concept` refuses with.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from dvar import mini
from dvar.config.training import BUNDLED_MODEL, TrainingConfig
from dvar.errors import RefusedInput
from dvar.stopping.rules import MIN_RECORDS, Dvar, schedule_problems
from dvar.training.run_layout import WRITTEN

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MODEL_PARTS = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")


def rule_problems(config: TrainingConfig) -> list[str]:
    """What keeps the rule of these settings from ever being one, or from ever stopping this run."""
    problems: list[str] = []
    try:
        Dvar(window=config.window, threshold=config.threshold)
    except RefusedInput as refused:
        problems += refused.problems
    if config.window >= MIN_RECORDS:
        problems += schedule_problems(config.window, config.probe_every, config.max_train_steps)
    return problems


def model_problems(name: str) -> list[str]:
    """What is wrong with a model's name or with the folder it names, as far as a look at the disk tells."""
    path = Path(name).expanduser()
    if name == BUNDLED_MODEL:
        try:
            mini.path()
        except RefusedInput as error:
            return list(error.problems)
        return []
    if path.is_dir():
        missing = [part for part in _MODEL_PARTS if not (path / part).exists()]
        said = f"model folder {name} is no diffusers pipeline, it lacks {', '.join(missing)}"
        if missing:
            return [f"{said}: name a folder that save_pretrained wrote"]
        return [
            f"model folder {name}: {problem}" for part in _MODEL_PARTS[1:] for problem in _part_problems(path / part)
        ]
    if path.is_file():
        return [f"model {name} is a single file: convert it to a diffusers folder and name that"]
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        return []
    beside = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) if path.parent.is_dir() else []
    alike = difflib.get_close_matches(path.name, beside, n=1)
    remedy = f"did you mean {path.parent / alike[0]}?" if alike else "check the path, or give a hub id as owner/name"
    return [f"model {name} is neither a folder here nor a hub id: {remedy}"]


def _part_problems(part: Path) -> list[str]:
    """What a look at one part of a model's folder tells: settings that are no JSON, weights that are not whole."""
    settings = {"scheduler": "scheduler_config.json", "tokenizer": None}.get(part.name, "config.json")
    try:
        if settings:
            json.loads((part / settings).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{part.name}/{settings} cannot be read ({_first_line(error)}): save the model again"]
    if part.name == "tokenizer":
        spelled = (part / "tokenizer.json").exists() or (part / "vocab.json").exists()
        return [] if spelled else ["tokenizer has neither tokenizer.json nor vocab.json: save the model again"]
    if part.name == "scheduler":
        return []
    files = sorted(part.glob("*.safetensors"))
    if not files:
        pickled = [file.name for file in part.iterdir() if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
        said = f"{part.name} has no .safetensors weights" + (
            f", only {pickled[0]}, which is never read" if pickled else ""
        )
        return [f"{said}: save the model again with safe_serialization=True"]
    problems = []
    for file in files:
        try:
            with safe_open(file, "np"):
                pass
        except (OSError, SafetensorError) as error:
            problems.append(f"{part.name}/{file.name} is damaged ({_first_line(error)}): copy it again")
    return problems


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def process_problems(environment: Mapping[str, str]) -> list[str]:
    """What launchers of several processes tell of themselves: one process trains here."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if (count := environment.get(name, "1")) != "1":
            said = f"dvar train runs in one process, got {name}={count}"
            return [f"{said}: start it without torchrun, mpirun, or accelerate launch of several processes"]
    return []


def output_problems(config: TrainingConfig) -> list[str]:
    """What stands in the way of writing into the run's folder: a file, pictures, another run, or nothing to resume."""
    folder, resume = Path(config.output_dir).expanduser(), config.resume_from_checkpoint
    if folder.exists() and not folder.is_dir():
        return [f"output_dir must be a folder, and {folder} is a file: choose another"]
    if config.instance_data_dir and folder.resolve() == Path(config.instance_data_dir).expanduser().resolve():
        return [f"output_dir must not be the folder of the pictures, {folder}: choose another"]
    if resume:
        saved = sorted(path.name for path in folder.glob("checkpoint-*"))
        if not saved or (resume != "latest" and Path(resume).name not in saved):
            found = f"it holds {', '.join(saved)}" if saved else "it holds no checkpoint"
            return [f"resume_from_checkpoint {resume!r} is not in {folder}, {found}: correct it or start afresh"]
    elif not config.overwrite and (there := sorted(path.name for name in WRITTEN for path in folder.glob(name))):
        said = f"output_dir {folder} holds another run, or files in its place ({', '.join(there[:4])}): choose another"
        return [f"{said} folder, go on with --resume_from_checkpoint latest, or replace them with --overwrite"]
    return []


def tracker_problems(name: str) -> list[str]:
    """What is wrong with a tracker's name: that its package, which has the same name, is not installed."""
    if name == "none" or importlib.util.find_spec(name):
        return []
    return [f"report_to {name} needs the package {name}, which is not installed: pip install {name}"]


def optimizer_problems(name: str) -> list[str]:
    """What is wrong with an optimizer's name: that the package it comes from is not installed."""
    package = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt"}.get(name)
    if package is None or importlib.util.find_spec(package):
        return []
    return [f"optimizer {name} needs the package {package}, which is not installed: pip install {package}"]


def clip_problems(name: str | None) -> list[str]:
    """What is wrong with a CLIP's name or with the folder it names, as far as a look at the disk tells."""
    path = Path(name or "").expanduser()
    if name is None or (path / "config.json").is_file() or (_HUB_ID.fullmatch(name) and not path.exists()):
        return []
    what = "holds no config.json" if path.is_dir() else "is neither a folder here nor a hub id"
    return [f"clip_model {name} {what}: name a folder that save_pretrained wrote, or a hub id as owner/name"]
