"""A finished run in the forms that other software reads: a LoRA under kohya's names, a whole pipeline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor

from dvar.config.training import AnyConfig
from dvar.diffusion.backbone import Backbone
from dvar.diffusion.tokens import model_path
from dvar.errors import RefusedInput
from dvar.files import write_whole
from dvar.runs.load_model import finished, read_weights
from dvar.training.run_layout import EMBEDS, LORA, kind
from dvar.training.weight_files import public_name, write_weights

_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}


def write_kohya(run: str | Path, path: Path) -> Path:
    """Return ``path``, into which the LoRA of a finished run was written as kohya's scripts write one.

    Raises: RefusedInput when the run has no LoRA or a damaged one, or when ``path`` is no new .safetensors file.
    Source: the names and the `alpha` of each layer are those of kohya-ss/sd-scripts for Stable Diffusion 1.x and 2.x.
    Deviates: diffusers' own converter writes the rank as alpha, whatever the alpha was.
    """
    config, result = finished(run)
    problems = []
    if LORA not in result["weights"]:
        said = f"--kohya takes the LoRA of a dreambooth-lora run, and {run} is of {config.method}: use --merged"
        problems.append(f"{said}, or its {EMBEDS}, which ComfyUI and AUTOMATIC1111 read as it is")
    if path.suffix != ".safetensors":
        problems.append(f"--kohya must name a .safetensors file, got {path}: try {path.with_suffix('.safetensors')}")
    if path.exists():
        problems.append(f"--kohya {path} exists already: name a new file")
    if problems:
        raise RefusedInput(problems)
    (matrices,) = read_weights(Path(run), [LORA])
    with safe_open(Path(run) / LORA, "pt") as file:
        told = dict(file.metadata())
    adapters = json.loads(told.pop(LORA_ADAPTER_METADATA_KEY))
    alphas = {part: float(adapters[f"{part}.lora_alpha"]) for part in _PREFIXES if f"{part}.lora_alpha" in adapters}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, _under_kohyas_names(matrices, alphas), told)
    return path


def write_merged(run: str | Path, folder: Path) -> Path:
    """Return ``folder``, into which the base model with all that a finished run learned was saved as one pipeline.

    It is in float32, and a new word is part of its vocabulary: a prompt needs nothing but the word.

    Raises: RefusedInput when ``folder`` is there already, or the run's weights are damaged; ModelError.
    """
    config, result = finished(run)
    if folder.exists():
        raise RefusedInput([f"--merged {folder} exists already: name a new folder"])
    weights = read_weights(Path(run), result["weights"])  # and so none of them is a pickle, which diffusers might read
    pipeline = Backbone.load(model_path(config.pretrained_model_name_or_path), device="cpu").pipeline()
    for name, tensors in zip(result["weights"], weights, strict=True):
        match kind(name):
            case word if word == EMBEDS:
                pipeline.load_textual_inversion(str(run), weight_name=name)
            case lora if lora == LORA:
                pipeline.load_lora_weights(str(run), weight_name=name)
                pipeline.fuse_lora()
                pipeline.unload_lora_weights()
            case _:
                pipeline.unet.load_state_dict(tensors, strict=False)
    staged = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    pipeline.save_pretrained(staged)
    write_whole(staged / "README.md", _card(config).encode())
    staged.replace(folder)
    return folder


def _under_kohyas_names(lora: Mapping[str, Tensor], alphas: Mapping[str, float]) -> dict[str, Tensor]:
    named = {}
    for name, matrix in lora.items():
        part, _, rest = name.partition(".")
        layer, _, side = rest.rpartition(".lora_")  # side: "A.weight" or "B.weight"
        if part == "text_encoder" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"  # the name before transformers 5, which all readers know
        layer = f"{_PREFIXES[part]}_{layer.replace('.', '_')}"
        named[f"{layer}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = matrix
        named[f"{layer}.alpha"] = torch.tensor(alphas[part])
    return named


def _card(config: AnyConfig) -> str:
    prompt = config.plain_prompt
    return (
        f"# {config.subject}\n\nA whole pipeline: {public_name(config)} with {config.learned} merged into it, learned "
        f"by {config.title}.\n\n```python\nfrom diffusers import StableDiffusionPipeline\n\n"
        f'pipeline = StableDiffusionPipeline.from_pretrained(".")\npipeline({json.dumps(prompt)}).images[0]'
        '.save("picture.png")\n```\n\nLicence: that of the base model.\n'
    )
