"""Checks of a model's files by a look at the disk, without loading it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dvar import mini
from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.diffusion import single_file
from dvar.diffusion.families import BackboneEntry, find_family
from dvar.diffusion.source import ModelSource, as_source
from dvar.errors import ModelError, RefusedInput, first_line
from dvar.files import read_json, regular_file

_VARIANT = re.compile(r"^(diffusion_pytorch_model|model)\.(?!safetensors)")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_CONFIG = "config.json"
_INDEX = "model_index.json"


def problems(config: TrainingConfig) -> list[str]:
    """Return what is wrong with the base model and the CLIP that ``config`` names, as far as their files tell."""
    name = config.pretrained_model_name_or_path
    source = ModelSource(name, config.revision, config.variant, config.single_file_config)
    return [*model_problems(source), *clip_problems(config.clip_model)]


def model_problems(model: str | ModelSource) -> list[str]:
    """Return what is wrong with a base model, given by hub id, by folder, by file, or as the bundled one."""
    source = as_source(model)
    name, path = source.name, Path(source.name).expanduser()
    if name in BUNDLED_MODELS:
        try:
            mini.path(name)
        except RefusedInput as error:
            return list(error.problems)
        return _option_problems(source, "the bundled model", ())
    if path.is_dir():
        problems = _folder_problems(name, path, source.variant)
        return problems or _option_problems(source, "a folder", ("variant",))
    if path.is_file():
        problems = _file_problems(replace(source, name=str(path)))
        return problems or _option_problems(source, "a single file", ("single_file_config",))
    if _HUB_ID.fullmatch(name) and not path.parent.is_dir():
        try:
            problems = _config_problems(f"model {name}", source.config_folder, "choose another")
        except ModelError as error:
            return [str(error)]
        return problems or _option_problems(source, "a hub id", ("revision", "variant"))
    siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()) if path.parent.is_dir() else []
    similar = difflib.get_close_matches(path.name, siblings, n=1)
    remedy = (
        f"did you mean {path.parent / similar[0]}?" if similar else "check the path, or give a hub id as owner/name"
    )
    return [f"model {name} is neither a folder here nor a hub id: {remedy}"]


def _option_problems(source: ModelSource, kind: str, admitted: Sequence[str]) -> list[str]:
    """Return which options of where a model is are not for this kind of place."""
    names = [name for name in ("revision", "variant", "single_file_config") if name not in admitted]
    options = {name: getattr(source, name) for name in names if getattr(source, name)}
    return [f"{name} is not for {kind}, got {value!r} with {source.name}: drop it" for name, value in options.items()]


def _file_problems(source: ModelSource) -> list[str]:
    """Return what is wrong with a model in a single file, and with the configs for it."""
    file = Path(source.name)
    if problems := single_file.file_problems(file):
        return problems
    kind = single_file.find_kind(file)
    try:
        folder = source.config_folder
    except ModelError as error:
        return [str(error)]
    name = f"single_file_config {source.single_file_config or kind.configs}"
    remedy = f"name the configs of a {kind.title}"
    if problems := _config_problems(name, folder, remedy):
        return problems
    if (pipeline := read_json(folder / _INDEX)["_class_name"]) != kind.pipeline:
        return [f"{name} is of a {pipeline}, and {file} of a {kind.title}: {remedy}"]
    index = read_json(folder / _INDEX, dict)
    missing = [
        part
        for part in single_file.missing_parts(file)
        if index.get(part, [None])[0] and not list((folder / part).glob("*.safetensors"))
    ]
    if missing:
        message = f"{file} lacks {', '.join(missing)}"
        return [f"{message}, and so does {name}: name a whole checkpoint, or a folder that has the rest"]
    return list(_scheduler_problems(file, name, read_json(folder / "scheduler" / "scheduler_config.json")))


def _scheduler_problems(file: Path, name: str, scheduler: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a single file says of its noise that the scheduler of its configs does not."""
    marks = single_file.read_header(file).keys()
    if "v_pred" in marks and scheduler.get("prediction_type") != "v_prediction":
        message = f"{file} predicts velocity, and the scheduler of {name} says {scheduler.get('prediction_type')}"
        yield f"{message}: copy the folder, and write v_prediction into its scheduler_config.json"
    if "ztsnr" in marks and not scheduler.get("rescale_betas_zero_snr"):
        message = f"{file} has no signal at its last timestep (ztsnr), and the scheduler of {name} leaves some"
        remedy = 'copy the folder, and write "rescale_betas_zero_snr": true and "timestep_spacing": "trailing" into its'
        yield f"{message}: {remedy} scheduler_config.json"


def _config_problems(title: str, folder: Path, remedy: str) -> list[str]:
    """Return what is wrong with the configs of a model, whose weights are elsewhere."""
    try:
        index = read_json(folder / _INDEX)
        family = find_family(title, index["_class_name"])
    except ModelError as error:
        return [str(error)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{title}: {_INDEX} cannot be read ({first_line(error)}): {remedy}"]
    if missing := _missing_parts(folder, index, family):
        return [f"{title} is no whole {family.title}, it lacks {', '.join(missing)}: {remedy}"]
    parts = family.parts_of(index)
    problems = [problem for part in parts for problem in _description_problems(folder / part)]
    return [f"{title}: {problem}" for problem in problems or _mixture_problems(folder, family, parts)]


def _folder_problems(name: str, path: Path, variant: str | None) -> list[str]:
    """Return what is wrong with the folder ``path`` of a base model."""
    remedy = "name a folder that save_pretrained wrote"
    try:
        index = read_json(path / _INDEX, {"_class_name": str})
        pipeline = index["_class_name"]
    except FileNotFoundError:
        return [f"model folder {name} is no diffusers pipeline, it lacks {_INDEX}: {remedy}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"model folder {name}: {_INDEX} cannot be read ({first_line(error)}): {remedy}"]
    try:
        family = find_family(name, pipeline)
    except ModelError as error:
        return [str(error)]
    if missing := _missing_parts(path, index, family):
        return [f"model folder {name} is no whole {family.title}, it lacks {', '.join(missing)}: {remedy}"]
    parts = family.parts_of(index)
    problems = [problem for part in parts for problem in _part_problems(path / part, variant)]
    return [f"model folder {name}: {problem}" for problem in problems or _mixture_problems(path, family, parts)]


def _missing_parts(folder: Path, index: Mapping[str, Any], family: BackboneEntry) -> list[str]:
    """Return the parts that a model lacks, or names as none, of those that it must have."""
    return [part for part in family.parts_of(index) if not (folder / part).exists() or index.get(part) == [None, None]]


def clip_problems(name: str | None) -> list[str]:
    """Return what is wrong with a CLIP, given by hub id or by folder."""
    path = Path(name or "").expanduser()
    if name is None or (path / _CONFIG).is_file() or (_HUB_ID.fullmatch(name) and not path.exists()):
        return []
    state = f"holds no {_CONFIG}" if path.is_dir() else "is neither a folder here nor a hub id"
    return [f"clip_model {name} {state}: name a folder that save_pretrained wrote, or a hub id as owner/name"]


def _description_problems(part: Path) -> list[str]:
    """Return what is wrong with the config or the tokenizer in one part of a model's folder."""
    if part.name.startswith("tokenizer"):
        vocabularies = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
        if any((part / name).exists() for name in vocabularies):
            return []
        return [f"{part.name} has neither tokenizer.json nor vocab.json: save the model again"]
    config = "scheduler_config.json" if part.name == "scheduler" else _CONFIG
    try:
        read_json(part / config, dict)
    except (OSError, ValueError) as error:
        return [f"{part.name}/{config} cannot be read ({first_line(error)}): save the model again"]
    return []


def _part_problems(part: Path, variant: str | None) -> list[str]:
    """Return what is wrong with one part of a model's folder: a config that is not JSON, weights that are damaged."""
    if (problems := _description_problems(part)) or part.name.startswith(("tokenizer", "scheduler")):
        return problems
    if "quantization_config" in read_json(part / _CONFIG):
        return [f"{part.name} is quantised already, and cannot be hashed or exported: name the full model"]
    files = sorted(part.glob("*.safetensors"))
    named = [file for file in files if _is_of_variant(file, variant)]
    if files and variant and not named:
        return [f"{part.name} has no weights of variant {variant}, only {files[0].name}: drop the variant"]
    if files and not named:
        return [f"{part.name} has only weights of a variant, {files[0].name}: name it, as in --variant fp16"]
    if not files:
        pickles = [file.name for file in part.iterdir() if file.suffix in (".bin", ".ckpt", ".pt", ".pth")]
        message = f"{part.name} has no .safetensors weights"
        message += f", only {pickles[0]}, which is never read" if pickles else ""
        return [f"{message}: save the model again with safe_serialization=True"]
    return [
        *(problem for file in files for problem in _weights_problems(file)),
        *(problem for file in named for problem in _precision_problems(file)),
    ]


def _is_of_variant(file: Path, variant: str | None) -> bool:
    """Return whether a file of weights is one of a variant; with None, whether it is one of none."""
    if variant is None:
        return not _VARIANT.search(file.name)
    return re.search(rf"\.{re.escape(variant)}[.-]", file.name) is not None


def _mixture_problems(path: Path, family: BackboneEntry, parts: Sequence[str]) -> list[str]:
    """Return which ``parts`` of a model's folder are none of this family, do not fit each other, or have no scale."""
    configs = {part: read_json(path / part / _CONFIG) for part in parts if part in family.kinds}
    problems = [line for part in ("vae", "vqvae") if part in configs for line in _scale_problems(part, configs[part])]
    for part in configs:
        kinds, kind = family.kinds[part], configs[part].get("_class_name") or configs[part].get("model_type")
        if kind and kind not in kinds:
            message = f"{part} must be a {kinds[0]} in a {family.title}, got a {kind}"
            problems.append(f"{message}: the folder is of several models, copy the model again")
    for size, summands in () if problems else family.widths:
        width, widths = _read_size(configs, size), [_read_size(configs, summand) for summand in summands]
        if width and all(widths) and width != (total := sum(filter(None, widths))):
            message = f"{size} must be {total}, the sum of {' and '.join(summands)}, got {width}"
            problems.append(f"{message}: the folder is of several models, copy the model again")
    return problems


def _scale_problems(part: str, config: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the scale of the latents of an autoencoder, where its config says it."""
    scale = config.get("scaling_factor", 1.0)
    if isinstance(scale, int | float) and 0 < scale < math.inf:
        return []
    return [f"scaling_factor in {part}/{_CONFIG} must be a number above 0, got {scale!r}: copy the file again"]


def _read_size(configs: Mapping[str, Mapping[str, Any]], name: str) -> int | None:
    """Return a size such as "unet.in_channels" by the configs of the parts; None where they do not say it."""
    part, _, key = name.partition(".")
    config = configs.get(part, {})
    value = config.get(key) or _as_object(config.get("text_config")).get(key)
    return value if isinstance(value, int) else None


def _as_object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _weights_problems(file: Path) -> list[str]:
    """Return what is wrong with a safetensors file, as far as its header tells."""
    try:
        with safe_open(regular_file(file), "np"):
            return []
    except (OSError, SafetensorError) as error:
        return [f"{file.parent.name}/{file.name} is damaged ({first_line(error)}): copy it again"]


def _precision_problems(file: Path) -> list[str]:
    """Return what is wrong with the precision of a safetensors file; of a damaged one, nothing."""
    try:
        narrow = single_file.narrow_types(single_file.read_header(file))
    except ModelError:
        return []
    message = f"{file.parent.name}/{file.name} must hold weights of 16 or 32 bits, got {', '.join(narrow)}"
    return [f"{message}: name the full model; --quantize makes it smaller"] if narrow else []
