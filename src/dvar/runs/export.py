"""Export of a finished run to other software: a LoRA with kohya's names, or a whole diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors import safe_open
from torch import Tensor, nn

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.source import ModelSource
from dvar.errors import RefusedInput
from dvar.files import read_json, regular_file, staged_folder
from dvar.locks import LOCK, lock_path, unless_empty
from dvar.runs import kohya
from dvar.runs.load_model import load_personalised_backbone, load_result, load_weights, loading_options
from dvar.training.loading_code import STABLE_DIFFUSION, embedding_names, generate_line, has_embedding
from dvar.training.pipeline_code import absent_arguments
from dvar.training.publish import push_run, repository_problems
from dvar.training.run_layout import CLIP_EMBEDS, EMBEDS, LORA, MODEL_CARD, weights_kind
from dvar.training.weight_files import public_model_name, write_weights

EMBEDDING_NAME = re.compile(r"[A-Za-z0-9._-]+")
"""A name that all programs take for a word in a prompt."""


def kohya_problems(run: str | Path, path: Path) -> list[str]:
    """Return why the LoRA of a finished run cannot be written to a file for kohya's scripts and ComfyUI."""
    config, result = load_result(run)
    family, problems = result.get("family", STABLE_DIFFUSION), _file_problems("kohya", path)
    if LORA not in result["weights"]:
        remedy = "use --embedding" if config.method == "textual-inversion" else "use --merged"
        problems.append(f"--kohya needs the LoRA of a dreambooth-lora run, and {run} is of {config.method}: {remedy}")
    elif family not in kohya.FORMATS:
        problems.append(
            f"--kohya knows the names of {', '.join(kohya.FORMATS)} alone, and {run} is of a {family}: "
            f"use its {LORA}, which diffusers reads as it is"
        )
    if getattr(config, "use_dora", False):
        problems.append(f"--kohya writes LoRA alone, and {run} is DoRA: use its {LORA}, or --merged")
    return problems


def write_kohya_lora(run: str | Path, path: Path, word: str | None = None) -> Path:
    """Write the LoRA of a finished run with the tensor names of kohya's scripts and ComfyUI, and return its path.

    Args:
        run: Folder of a finished run.
        path: A new .safetensors file.
        word: What readers of the file call the new word, if there is one: the name of the file of its embedding.

    Raises:
        RefusedInput: The run has no LoRA or a damaged one, or ``path`` is not a new .safetensors file.

    Source: the names and the `alpha` of each layer are those that `dvar.runs.kohya.rename` says.
    Deviates: diffusers' own converter writes the rank as alpha, whatever the alpha was.
    """
    if problems := kohya_problems(run, path):
        raise RefusedInput(problems)
    config, result = load_result(run)
    family = result.get("family", STABLE_DIFFUSION)
    (lora,) = load_weights(Path(run), [LORA])
    try:
        with safe_open(regular_file(Path(run) / LORA), "pt") as file:
            metadata = dict(file.metadata())
        adapters = json.loads(metadata.pop(LORA_ADAPTER_METADATA_KEY))
        parts = [part for part in kohya.FORMATS[family].prefixes if f"{part}.lora_alpha" in adapters]
        alphas = {part: float(adapters[f"{part}.lora_alpha"]) for part in parts}
        configs = ModelSource.of(config).config_folder
        denoiser = read_json(configs / parts[0] / "config.json", dict)
        scheduler = read_json(configs / "scheduler" / "scheduler_config.json", dict)
        tensors = kohya.rename(lora, alphas, family, denoiser)
        rank, alpha, prediction = int(adapters[f"{parts[0]}.r"]), alphas[parts[0]], scheduler.get("prediction_type")
        facts: dict[str, Any] = {"word": word, "denoiser": denoiser, "prediction": prediction}
        metadata |= kohya.describe(config, family, rank, alpha, path.stem, **facts)
    except (ValueError, TypeError, LookupError) as error:
        message = f"{Path(run) / LORA} is not the LoRA that this run wrote ({error})"
        raise RefusedInput([f"{message}: restore it or train again"]) from error
    _write_new(path, tensors, metadata, "kohya")
    return path


def embedding_problems(run: str | Path, path: Path) -> list[str]:
    """Return why the new word of a finished run cannot be written to a file for other programs."""
    config, result = load_result(run)
    problems = _file_problems("embedding", path)
    if not has_embedding(config.method, result):
        run_of = f"{config.title} on a {result.get('family', STABLE_DIFFUSION)}"
        rule = "--embedding needs one new word that other programs can use by itself"
        problems.append(f"{rule}, and {run} is {run_of} with {len(embedding_names(result))}: use --merged")
    if not EMBEDDING_NAME.fullmatch(path.stem):
        rule = "--embedding is what prompts call the word, in letters, digits, '.', '_' and '-'"
        problems.append(f"{rule}, got {path.stem!r}: name another file")
    return problems


def write_embedding(run: str | Path, path: Path) -> Path:
    """Write the vectors of the new word of a finished run as other programs read them, and return the path.

    These programs call the word by the name of the file. A word of one text encoder is written as ``emb_params``, one
    of two as ``clip_l`` and ``clip_g``, each [vectors, width].

    Args:
        run: Folder of a finished run.
        path: A new .safetensors file.

    Raises:
        RefusedInput: As `embedding_problems`, or the weights are damaged.

    Source: the layouts that ComfyUI, AUTOMATIC1111, Forge, InvokeAI and kohya's scripts read alike.
    """
    if problems := embedding_problems(run, path):
        raise RefusedInput(problems)
    config, result = load_result(run)
    names = embedding_names(result)
    (vectors,) = load_weights(Path(run), names)
    if weights_kind(names[0]) == EMBEDS:
        vectors = {"emb_params": vectors[str(config.placeholder_token)]}
    _write_new(path, vectors, {"modelspec.title": path.stem, "modelspec.trigger_phrase": path.stem}, "embedding")
    return path


def describe_embedding(run: str | Path, name: str) -> list[str]:
    """Return how programs call the new word of a run whose embedding has this file name, without its suffix."""
    config, result = load_result(run)
    if result.get("family", STABLE_DIFFUSION) in (kohya.STABLE_DIFFUSION, kohya.STABLE_DIFFUSION_XL):
        return [f"ComfyUI: embedding:{name}", f"AUTOMATIC1111 and Forge: {name}", f"InvokeAI: <{name}>"]
    return [f"ComfyUI: embedding:{name} in the text for CLIP, {config.placeholder_token} in that for T5"]


def _file_problems(flag: str, path: Path) -> list[str]:
    """Return why a file that ``flag`` names cannot be written as new weights."""
    problems = []
    if path.suffix != ".safetensors":
        problems.append(f"--{flag} must name a .safetensors file, got {path}: try {path.with_suffix('.safetensors')}")
    if path.exists():
        problems.append(f"--{flag} {path} exists already: name a new file")
    return problems


def _write_new(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], flag: str) -> None:
    """Write weights to the file that ``flag`` names, which no other process may be writing."""
    with unless_empty(path.parent), lock_path(path.with_name(f".{path.name}{LOCK}"), path):
        if problems := _file_problems(flag, path):
            raise RefusedInput(problems)
        write_weights(path, tensors, metadata)


def merged_problems(folder: Path) -> list[str]:
    """Return why a whole pipeline cannot be written to a folder."""
    return [f"--merged {folder} exists already: name a new folder"] if folder.exists() else []


def write_merged_pipeline(run: str | Path, folder: Path, mixed_precision: str | None = None) -> Path:
    """Write the base model with everything a finished run learned as one pipeline, and return its folder.

    Placeholder tokens are part of its vocabulary, so a prompt needs no preparation. A base that the run quantised is
    written whole.

    Args:
        run: Folder of a finished run.
        folder: A new folder.
        mixed_precision: The precision of the networks, as the run loads them under it; the run's own by default.

    Raises:
        RefusedInput: ``folder`` exists, or the weights of the run are damaged.
        ModelError: The base model cannot be loaded.
    """
    config, result = load_result(run)
    if problems := merged_problems(folder):
        raise RefusedInput(problems)
    # Loaded before diffusers sees the folder, which might read a pickle in place of a missing safetensors file, and
    # would leave out what does not fit without a word.
    weights = load_weights(Path(run), result["weights"])
    options = loading_options(config, mixed_precision, quantize="no", offload=False)
    load_personalised_backbone(run, device="cpu", **options)
    backbone = load_backbone(ModelSource.of(config), device="cpu", **options)
    pipeline = backbone.pipeline()
    for name, tensors in zip(result["weights"], weights, strict=True):
        kind = weights_kind(name)
        if kind == EMBEDS:
            _add_words(pipeline, tensors)
        elif kind == CLIP_EMBEDS:
            for key, part in (("clip_l", ""), ("clip_g", "_2")):
                _add_vectors(pipeline, part, str(config.placeholder_token), tensors[key])
        elif kind == LORA:
            _fuse_lora(pipeline, str(run), name, sorted({key.partition(".")[0] for key in tensors}))
        else:
            pipeline.unet.load_state_dict(tensors, strict=False)
    with staged_folder(folder) as staged:
        pipeline.save_pretrained(staged)
        card = _format_model_card(config, backbone, read_json(staged / "model_index.json", dict))
        (staged / MODEL_CARD).write_text(card, encoding="utf-8", newline="\n")
    return folder


def push_problems(repository: str) -> list[str]:
    """Return why a run cannot be uploaded to a repository."""
    return repository_problems(repository, "--push_to_hub")


def push_finished_run(run: Path, repository: str) -> str:
    """Upload a finished run to the hub and return its full id there.

    Raises:
        RefusedInput: ``run`` is no finished run, its weights are damaged, or nothing can be pushed from here.
        ModelError: The hub refuses it or cannot be reached.
    """
    _, result = load_result(run)
    if problems := push_problems(repository):
        raise RefusedInput(problems)
    load_weights(Path(run), result["weights"])
    return push_run(Path(run), repository)


def _add_words(pipeline: Any, vectors: Mapping[str, Tensor]) -> None:
    """Put the vectors of placeholder tokens into the only text encoder that learns."""
    if hasattr(pipeline, "load_textual_inversion"):
        pipeline.load_textual_inversion(dict(vectors))
        return
    for token, rows in vectors.items():
        _append_vector(pipeline.tokenizer, pipeline.bert, token, rows)


def _fuse_lora(pipeline: Any, folder: str, name: str, parts: Sequence[str]) -> None:
    """Add a LoRA to the weights of the ``parts`` that it changes, by the U-Net where the pipeline has no loader."""
    if hasattr(pipeline, "load_lora_weights"):
        pipeline.load_lora_weights(folder, weight_name=name)
        pipeline.fuse_lora(components=list(parts))  # of FLUX it would leave the text encoder as it was
        pipeline.unload_lora_weights()
        return
    pipeline.unet.load_lora_adapter(folder, weight_name=name, prefix="unet")
    pipeline.unet.fuse_lora()
    pipeline.unet.unload_lora()


def _add_vectors(pipeline: Any, part: str, token: str, vectors: Tensor) -> None:
    """Put the vectors of a token into one of two text encoders, by diffusers' loader where the pipeline has it."""
    tokenizer, encoder = getattr(pipeline, f"tokenizer{part}"), getattr(pipeline, f"text_encoder{part}")
    if hasattr(pipeline, "load_textual_inversion"):
        pipeline.load_textual_inversion({token: vectors}, text_encoder=encoder, tokenizer=tokenizer)
        return
    _append_vector(tokenizer, encoder, token, vectors)


def _append_vector(tokenizer: Any, encoder: Any, token: str, vectors: Tensor) -> None:
    """Make a placeholder token the last of the vocabulary, with its vector."""
    tokenizer.add_tokens(token)
    encoder.resize_token_embeddings(len(tokenizer))
    encoder.get_input_embeddings().weight.data[-1] = vectors[0]
    if hasattr(encoder, "to_logits"):  # of the BERT of Latent Diffusion, which nothing reads but its loader measures
        old = encoder.to_logits
        encoder.to_logits = nn.Linear(old.in_features, len(tokenizer)).requires_grad_(False)
        encoder.to_logits.weight[: old.out_features], encoder.to_logits.bias[: old.out_features] = old.weight, old.bias


def _format_model_card(config: TrainingConfig, backbone: Backbone, index: Mapping[str, Any]) -> str:
    arguments = ", ".join(['"."', *absent_arguments(index)])
    unchecked = backbone.title == STABLE_DIFFUSION
    note = "It has no safety checker: look at its images before others see them.\n\n" if unchecked else ""
    return f"""# {config.subject}

A whole pipeline: {public_model_name(config)} with {config.learned} merged into it, learned by {config.title}.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({arguments})
{generate_line(config, config.plain_prompt, backbone.title)}
```

{note}Licence: that of the base model.
"""
