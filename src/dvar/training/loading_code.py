"""How other software takes the weight files of a run: the Python lines that load them in stock diffusers, and words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dvar.config.training import TrainingConfig
from dvar.training.run_layout import ATTENTION, CLIP_EMBEDS, EMBEDS, LORA, WEIGHTS, weights_kind

STABLE_DIFFUSION, STABLE_DIFFUSION_3, LATENT_DIFFUSION = "Stable Diffusion", "Stable Diffusion 3", "Latent Diffusion"
QWEN_IMAGE = "Qwen-Image"
"""Families by their `Backbone.title`; the first is what results mean that are from before there were others."""


def has_embedding(method: str, result: Mapping[str, Any]) -> bool:
    """Return whether other programs can use the new word of a run by itself.

    Args:
        method: The method of the run.
        result: Its result, with "weights" and "family".
    """
    by_itself = method != "custom-diffusion" and result.get("family", STABLE_DIFFUSION) != LATENT_DIFFUSION
    return by_itself and len(embedding_names(result)) == 1


def embedding_names(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the files with vectors of new words."""
    stems = tuple(Path(kind).stem for kind in (EMBEDS, CLIP_EMBEDS))
    return [name for name in result["weights"] if name.startswith(stems)]


def import_lines(names: Iterable[str], family: str = STABLE_DIFFUSION) -> list[str]:
    """Return the import lines that `load_lines` of these files needs."""
    read = {ATTENTION, CLIP_EMBEDS, *((EMBEDS,) if family == LATENT_DIFFUSION else ())} & set(map(weights_kind, names))
    return ["from safetensors.torch import load_file"] if read else []


def load_lines(
    names: Iterable[str], folder: str = ".", token: str | None = None, family: str = STABLE_DIFFUSION
) -> list[str]:
    """Return the lines that load weight files into ``pipeline``, a stock `DiffusionPipeline`.

    Args:
        names: The names of the files.
        folder: The folder in which they are.
        token: The placeholder token, which `CLIP_EMBEDS` does not name.
        family: The family of the base model, by its `Backbone.title`.

    Deviates: Custom Diffusion's weights are read by the U-Net itself, since the loader that diffusers documents for
        them changes nothing (its issue 9320). The pipeline of Latent Diffusion has no loader, so its parts load.
    """
    ordered = sorted(names, key=lambda name: (WEIGHTS.index(weights_kind(name)), name))
    return [line for name in ordered for line in _load_lines_of(name, folder, json.dumps(token), family)]


def generate_line(config: TrainingConfig, prompt: str, family: str = STABLE_DIFFUSION) -> str:
    """Return the line that generates an image of a prompt with ``pipeline``, as the samples of the run are.

    Args:
        config: The config of the run.
        prompt: The prompt.
        family: The family of the base model, by its `Backbone.title`.
    """
    quoted = json.dumps(prompt, ensure_ascii=False)
    guidance = f"guidance_scale={config.guidance_scale:g}"
    if family == QWEN_IMAGE:
        guidance = f'negative_prompt=" ", true_cfg_scale={config.guidance_scale:g}'
    options = f"num_inference_steps={config.num_inference_steps}, {guidance}"
    return f'pipeline(prompt={quoted}, {options}).images[0].save("image.png")'


_BERT_LINES = """for token, vectors in load_file({path}).items():
    pipeline.tokenizer.add_tokens(token)
    pipeline.bert.resize_token_embeddings(len(pipeline.tokenizer))
    pipeline.bert.get_input_embeddings().weight.data[-1] = vectors[0]"""


def _load_lines_of(name: str, folder: str, token: str, family: str) -> list[str]:
    """Return the lines that load one file."""
    quoted_folder = json.dumps(folder, ensure_ascii=False)
    quoted_path = json.dumps(name if folder == "." else f"{folder}/{name}", ensure_ascii=False)
    if family == LATENT_DIFFUSION and weights_kind(name) == EMBEDS:
        return [_BERT_LINES.format(path=quoted_path)]
    if family == LATENT_DIFFUSION and weights_kind(name) == LORA:
        return [f'pipeline.unet.load_lora_adapter({quoted_folder}, weight_name="{name}", prefix="unet")']
    return {
        EMBEDS: [f'pipeline.load_textual_inversion({quoted_folder}, weight_name="{name}")'],
        CLIP_EMBEDS: [
            f"embeds = load_file({quoted_path})",
            *_embeds_lines("clip_l", "", token, family),
            *_embeds_lines("clip_g", "_2", token, family),
        ],
        LORA: [f'pipeline.load_lora_weights({quoted_folder}, weight_name="{name}")'],
        ATTENTION: [f"pipeline.unet.load_state_dict(load_file({quoted_path}), strict=False)"],
    }[weights_kind(name)]


def _embeds_lines(key: str, part: str, token: str, family: str) -> list[str]:
    """Return the lines that give one of two CLIPs its vectors; the pipeline of Stable Diffusion 3 has no loader."""
    tokenizer, encoder = f"pipeline.tokenizer{part}", f"pipeline.text_encoder{part}"
    if family == STABLE_DIFFUSION_3:
        return [
            f"{tokenizer}.add_tokens({token})",
            f"{encoder}.resize_token_embeddings(len({tokenizer}))",
            f'{encoder}.get_input_embeddings().weight.data[-1] = embeds["{key}"][0]',
        ]
    vectors = f'{{{token}: embeds["{key}"]}}'
    return [f"pipeline.load_textual_inversion({vectors}, text_encoder={encoder}, tokenizer={tokenizer})"]
