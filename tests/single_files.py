"""A pipeline of diffusers as a single checkpoint file, under the names of the original code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def unet_name(name: str, layers: int) -> str:
    """Return the original name of a tensor of a U-Net with ``layers`` residual blocks at each size."""
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name):
        side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
        number = 1 + block * (layers + 1) + index if side == "down" else block * (layers + 1) + index
        prefix = f"{'input' if side == 'down' else 'output'}_blocks.{number}"
        if kind == "upsamplers":
            return f"output_blocks.{block * (layers + 1) + layers}.1.{rest}"  # of a block without attention
        return f"{prefix}.{0 if kind == 'resnets' else 1}.{resnet_name(rest) if kind == 'resnets' else rest}"
    for ours, theirs in OUTER.items():
        if name.startswith(f"{ours}."):
            rest = name.removeprefix(f"{ours}.")
            return f"{theirs}.{resnet_name(rest) if 'resnets' in ours else rest}"
    raise AssertionError(name)


def resnet_name(name: str) -> str:
    part, _, rest = name.partition(".")
    return f"{RESNET[part]}.{rest}"


def vae_name(name: str, levels: int) -> str:
    """Return the original name of a tensor of an autoencoder with ``levels`` sizes."""
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
    if "mid_block.attentions.0." in name:
        start, _, rest = name.partition("mid_block.attentions.0.")
        part, kind = rest.rsplit(".", 1)
        name = f"{start}mid.attn_1.{ATTENTION[part]}.{kind}"
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets", r"encoder.down.\1.block", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    name = name.replace(".resnets.", ".block.").replace(".upsamplers.0.", ".upsample.")
    return name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def as_stored(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor of an autoencoder as the original code has it: its attention consists of convolutions."""
    is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight", name)
    return tensor[:, :, None, None] if is_projection and tensor.ndim == 2 else tensor


def write_single_file(pipeline: Any, file: Path, *, text: bool = True) -> Path:
    """Write the U-Net and the autoencoder of a pipeline, and the only text encoder, as one checkpoint."""
    layers, levels = pipeline.unet.config.layers_per_block, len(pipeline.vae.config.block_out_channels)
    tensors = {
        f"model.diffusion_model.{unet_name(name, layers)}": part for name, part in pipeline.unet.state_dict().items()
    }
    for name, part in pipeline.vae.state_dict().items():
        original = vae_name(name, levels)
        tensors[f"first_stage_model.{original}"] = as_stored(original, part)
    if text:
        for name, part in pipeline.text_encoder.state_dict().items():
            inner = name if name.startswith("text_model.") else f"text_model.{name}"
            tensors[f"cond_stage_model.transformer.{inner}"] = part
    save_file({name: part.contiguous() for name, part in tensors.items()}, file)
    return file
