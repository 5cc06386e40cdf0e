"""The names of tensors and the metadata in LoRA files of kohya's scripts, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dvar.config.training import TrainingConfig

STABLE_DIFFUSION, STABLE_DIFFUSION_XL = "Stable Diffusion", "Stable Diffusion XL"
PREFIXES: Mapping[str, Mapping[str, str]] = {
    STABLE_DIFFUSION: {"unet": "lora_unet", "text_encoder": "lora_te"},
    STABLE_DIFFUSION_XL: {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
"""How the names of a family begin, by the part of the pipeline; the families whose names are known."""
_VERSIONS = {STABLE_DIFFUSION: "sd_v1", STABLE_DIFFUSION_XL: "sdxl_base_v1-0"}
_ARCHITECTURES = {STABLE_DIFFUSION: "stable-diffusion-v1/lora", STABLE_DIFFUSION_XL: "stable-diffusion-xl-v1-base/lora"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)")


def rename(
    lora: Mapping[str, Tensor], alphas: Mapping[str, float], family: str, layers_per_block: int
) -> dict[str, Tensor]:
    """Return the matrices under kohya's names, and the alpha of each layer.

    Args:
        lora: The matrices under diffusers' names.
        alphas: The alpha of each part of the pipeline.
        family: A key of `PREFIXES`.
        layers_per_block: The residual blocks at each size of the U-Net, as its config says.

    Source: kohya-ss/sd-scripts, networks/lora.py: names of diffusers for the U-Net of Stable Diffusion 1.x and 2.x, and
        those of the original code, input_blocks and output_blocks, for that of XL.
    """
    tensors = {}
    for name, matrix in lora.items():
        part, _, rest = name.partition(".")
        layer, _, side = rest.rpartition(".lora_")  # side: "A.weight" or "B.weight"
        if part != "unet" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"  # its name before transformers 5, which all readers expect
        if part == "unet" and family == STABLE_DIFFUSION_XL:
            layer = original_name(layer, layers_per_block)
        layer = f"{PREFIXES[family][part]}_{layer.replace('.', '_')}"
        tensors[f"{layer}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = matrix
        tensors[f"{layer}.alpha"] = torch.tensor(alphas[part])
    return tensors


def original_name(layer: str, layers_per_block: int) -> str:
    """Return the name of an attention layer of a U-Net in the original code of Stable Diffusion."""
    if layer.startswith("mid_block.attentions.0."):
        return layer.replace("mid_block.attentions.0.", "middle_block.1.")
    match = _BLOCK.fullmatch(layer)
    if not match:
        raise ValueError(f"no name is known for {layer}")
    side, block, index, rest = match[1], int(match[2]), int(match[3]), match[4]
    if side == "down":  # the first input block is a convolution, and each size ends with one
        return f"input_blocks.{1 + block * (layers_per_block + 1) + index}.1.{rest}"
    return f"output_blocks.{block * (layers_per_block + 1) + index}.1.{rest}"


def describe(config: TrainingConfig, family: str, rank: int, alpha: float, name: str) -> dict[str, str]:
    """Return the metadata that readers show: the base, rank and alpha, and the words that call up the concept.

    Args:
        config: The config of the run.
        family: A key of `PREFIXES`.
        rank: The rank of the matrices.
        alpha: Their alpha.
        name: The name of the file, without its suffix.

    Source: kohya-ss/sd-scripts, and the Stability AI model metadata specification for ``modelspec``.
    """
    trigger = config.placeholder_token or str(config.instance_prompt)
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": _VERSIONS[family],
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_output_name": name,
        "ss_tag_frequency": json.dumps({"concept": {trigger: 1}}),
        "ss_seed": str(config.seed),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": _ARCHITECTURES[family],
        "modelspec.title": name,
        "modelspec.trigger_phrase": trigger,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
    }
