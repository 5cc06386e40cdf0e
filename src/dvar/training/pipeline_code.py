"""The Python lines by which stock diffusers loads the base model of a run as the run itself loaded it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvar import mini
from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS, TrainingConfig
from dvar.diffusion.single_file import find_kind, missing_parts
from dvar.errors import RefusedInput
from dvar.files import read_json
from dvar.training.weight_files import public_name

_INDEX = "model_index.json"


def pipeline_import_lines(config: TrainingConfig) -> list[str]:
    """Return the import lines that `load_pipeline_code` of ``config`` needs."""
    classes = {"diffusers": {_pipeline_class(config)}}
    for library, kind in _parts_elsewhere(config).values():
        classes.setdefault(library, set()).add(kind)
    lines = [f"from {library} import {', '.join(sorted(names))}" for library, names in sorted(classes.items())]
    return ["import dvar.mini"] * (config.pretrained_model_name_or_path in BUNDLED_MODELS) + lines


def load_pipeline_code(config: TrainingConfig, *, public: bool) -> str:
    """Return the expression that loads the base model of ``config`` in stock diffusers.

    Args:
        config: The config of the run.
        public: Whether it is for others, who must not read where folders and files are.
    """
    arguments, parts = [_name_argument(config, public=public)], _parts_elsewhere(config)
    if configs := _configs_of_file(config):
        folder = _quote(configs, public=public)
        arguments += [f"config={folder}"]
        # As a file holds it, such a part may be in half precision beside the rest in float32.
        arguments += [
            f'{part}={kind}.from_pretrained({folder}, subfolder="{part}").float()' for part, (_, kind) in parts.items()
        ]
    options = {"revision": config.revision, "variant": config.variant}
    arguments += [f"{name}={json.dumps(value)}" for name, value in options.items() if value]
    arguments += absent_arguments(_read_index(config))
    call = f"{_pipeline_class(config)}.{'from_single_file' if configs else 'from_pretrained'}"
    if parts:
        return "\n".join([f"{call}(", *(f"    {argument}," for argument in arguments), ")"])
    return f"{call}({', '.join(arguments)})"


def absent_arguments(index: Mapping[str, Any]) -> list[str]:
    """Return the arguments by which a pipeline loads without the text encoders that its model_index.json lacks.

    Stock diffusers does without other parts by itself, but wants to be told of these (Stable Diffusion 3 without T5).
    """
    encoders = ("text_encoder", "tokenizer")
    return [f"{part}=None" for part, kind in index.items() if part.startswith(encoders) and kind == [None, None]]


def _single_file(config: TrainingConfig) -> Path | None:
    """Return the path of the base model where it is a single file that is at hand."""
    path = Path(config.pretrained_model_name_or_path).expanduser()
    return path if path.is_file() else None


def _pipeline_class(config: TrainingConfig) -> str:
    """Return the class by which stock diffusers loads the base model: for a single file, its own."""
    file = _single_file(config)
    return find_kind(file).pipeline if file else "DiffusionPipeline"


def _name_argument(config: TrainingConfig, *, public: bool) -> str:
    """Return the first argument, which says where the base model is."""
    name = config.pretrained_model_name_or_path
    if name not in BUNDLED_MODELS:
        return _quote(name, public=public)
    argument = "" if name == BUNDLED_MODEL else json.dumps(name)
    return f"str(dvar.mini.path({argument}))"


def _quote(name: str, *, public: bool) -> str:
    """Return the name of a model as a string of Python."""
    return json.dumps(public_name(name) if public else name, ensure_ascii=False)


def _configs_of_file(config: TrainingConfig) -> str | None:
    """Return the folder or hub id with the configs of the base model where it is a single file."""
    file = _single_file(config)
    return (config.single_file_config or find_kind(file).configs) if file else None


def _parts_elsewhere(config: TrainingConfig) -> dict[str, tuple[str, str]]:
    """Return the library and the class of the parts that a single file lacks and that are with its configs."""
    file, index = _single_file(config), _read_index(config)
    lacking = missing_parts(file) if file else ()
    return {part: (index[part][0], index[part][1]) for part in lacking if index.get(part, [None])[0]}


def _read_index(config: TrainingConfig) -> dict[str, Any]:
    """Return the model_index.json of the base model, empty where it is not at hand: no code is worth a download."""
    name = _configs_of_file(config) or config.pretrained_model_name_or_path
    try:
        folder = mini.path(name) if name in BUNDLED_MODELS else Path(name).expanduser()
        file = folder / _INDEX if folder.is_dir() else _cached_index(name, config.revision)
        return read_json(file, dict) if file else {}
    except (RefusedInput, OSError, ValueError):
        return {}


def _cached_index(name: str, revision: str | None) -> Path | None:
    """Return the model_index.json of a model on the hub in the cache."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, _INDEX, revision=revision)
    return Path(file) if isinstance(file, str) else None
