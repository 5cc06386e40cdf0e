"""A pipeline of diffusers as a single checkpoint file, under the names of the original code."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
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


def vae_tensors(vae: Any) -> dict[str, Tensor]:
    """Return the tensors of an autoencoder as a checkpoint holds them."""
    names = {name: vae_name(name, len(vae.config.block_out_channels)) for name in vae.state_dict()}
    return {f"first_stage_model.{names[name]}": as_stored(names[name], part) for name, part in vae.state_dict().items()}


def write_single_file(pipeline: Any, file: Path, *, text: bool = True) -> Path:
    """Write the U-Net and the autoencoder of a pipeline, and the only text encoder, as one checkpoint."""
    layers = pipeline.unet.config.layers_per_block
    tensors = {
        f"model.diffusion_model.{unet_name(name, layers)}": part for name, part in pipeline.unet.state_dict().items()
    }
    tensors |= vae_tensors(pipeline.vae)
    if text:
        for name, part in pipeline.text_encoder.state_dict().items():
            inner = name if name.startswith("text_model.") else f"text_model.{name}"
            tensors[f"cond_stage_model.transformer.{inner}"] = part
    save_file({name: part.contiguous() for name, part in tensors.items()}, file)
    return file


JOINT_OUTER = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
JOINT_LAYERS = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}


def joint_tensors(weights: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return the tensors of a transformer of Stable Diffusion 3 as a checkpoint holds them."""
    tensors = {}
    for name, part in weights.items():
        layer, _, kind = name.rpartition(".")
        if not name.startswith("transformer_blocks."):
            original = JOINT_OUTER.get(name) or f"{JOINT_OUTER[layer]}.{kind}"
        else:
            _, block, inner = layer.split(".", 2)
            if inner not in JOINT_LAYERS:
                continue
            original = f"joint_blocks.{block}.{JOINT_LAYERS[inner]}.{kind}"
        last = f"transformer_blocks.{layers - 1}.norm1_context.linear"
        if layer in ("norm_out.linear", last):  # shift and scale are the other way round
            part = torch.cat(part.chunk(2)[::-1])
        tensors[original] = part
    for number in range(layers):
        for original, parts in JOINED.items():
            for kind in ("weight", "bias"):
                rows = [weights[f"transformer_blocks.{number}.{part}.{kind}"] for part in parts]
                tensors[f"joint_blocks.{number}.{original}.{kind}"] = torch.cat(rows)
    return tensors


def write_single_file_of_3(pipeline: Any, file: Path, *, text: bool, prefix: str = "model.diffusion_model.") -> Path:
    """Write the transformer and the autoencoder of a Stable Diffusion 3, and its text encoders, as one checkpoint."""
    transformer = pipeline.transformer
    joint = joint_tensors(transformer.state_dict(), transformer.config.num_layers)
    tensors = {f"{prefix}{name}": part for name, part in joint.items()} | vae_tensors(pipeline.vae)
    encoders = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"}
    for name, encoder in encoders.items() if text else ():
        weights = getattr(pipeline, encoder).state_dict()
        if name == "clip_l":  # which has no projection in such files: it is the identity
            del weights["text_projection.weight"]
        tensors |= {f"text_encoders.{name}.transformer.{key}": part for key, part in weights.items()}
    save_file({name: part.clone().contiguous() for name, part in tensors.items()}, file)
    return file
