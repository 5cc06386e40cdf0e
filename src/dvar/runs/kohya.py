"""The names of tensors and the metadata in LoRA files of kohya's scripts, which ComfyUI and AUTOMATIC1111 read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dvar.config.training import TrainingConfig

STABLE_DIFFUSION, STABLE_DIFFUSION_XL, STABLE_DIFFUSION_3 = (
    "Stable Diffusion",
    "Stable Diffusion XL",
    "Stable Diffusion 3",
)
FLUX_1, FLUX_2 = "FLUX.1", "FLUX.2 klein"


@dataclass(frozen=True)
class LoraFormat:
    """Names by which other software reads the LoRA of a family.

    Attributes:
        version: The base model in ``ss_base_model_version``.
        architecture: The base model in ``modelspec.architecture``.
        prefixes: How the names of a part of the pipeline begin, the denoising network's first. A prefix that ends with
            an underscore has the dots of layers made underscores too.
        module: The module of kohya's scripts that trains such a LoRA, in ``ss_network_module``.
        implementation: Whose code the names of layers are of, in ``modelspec.implementation``.
        has_alpha: Whether the file holds the alpha of each layer; the scale is in the second factors if not.
    """

    version: str
    architecture: str
    prefixes: Mapping[str, str]
    module: str = "networks.lora"
    implementation: str = "diffusers"
    has_alpha: bool = True


_WIDTH_OF_2, _WIDTH_OF_9B, _LAYERS_OF_LARGE = 1024, 12288, 38
"""The width of the text of Stable Diffusion 2 and of FLUX.2 klein 9B; the layers of Stable Diffusion 3.5 large."""
FORMATS: Mapping[str, LoraFormat] = {
    STABLE_DIFFUSION: LoraFormat("sd_v1", "stable-diffusion-v1", {"unet": "lora_unet_", "text_encoder": "lora_te_"}),
    STABLE_DIFFUSION_XL: LoraFormat(
        "sdxl_base_v1-0",
        "stable-diffusion-xl-v1-base",
        {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
        implementation="https://github.com/Stability-AI/generative-models",
    ),
    STABLE_DIFFUSION_3: LoraFormat(
        "sd3",
        "stable-diffusion-3",
        {part: f"{part}." for part in ("transformer", "text_encoder", "text_encoder_2")},
        "networks.lora_sd3",
        has_alpha=False,
    ),
    FLUX_1: LoraFormat(
        "flux1",
        "flux-1",
        {"transformer": "lora_unet_", "text_encoder": "lora_te1_"},
        "networks.lora_flux",
        "https://github.com/black-forest-labs/flux",
    ),
    FLUX_2: LoraFormat(
        "flux_2_klein",
        "Flux.2-klein",
        {"transformer": "lora_unet_"},
        "networks.lora_flux_2",
        "https://github.com/black-forest-labs/flux2",
    ),
    "Z-Image": LoraFormat(
        "z_image",
        "Z-Image",
        {"transformer": "diffusion_model."},
        "networks.lora_zimage",
        "https://github.com/Tongyi-MAI/Z-Image",
    ),
    "Qwen-Image": LoraFormat(
        "qwen_image",
        "Qwen-Image",
        {"transformer": "lora_unet_"},
        "networks.lora_qwen_image",
        "https://github.com/QwenLM/Qwen-Image",
    ),
}
"""The families whose names both ComfyUI and stock diffusers read."""
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.*)")
_FLUX_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.*)")
_FLUX_LAYERS = {
    "attn.to_out.0": ("img_attn.proj", ""),
    "attn.to_add_out": ("txt_attn.proj", ""),
    "ff.net.0.proj": ("img_mlp.0", ""),
    "ff.net.2": ("img_mlp.2", ""),
    "ff_context.net.0.proj": ("txt_mlp.0", ""),
    "ff_context.net.2": ("txt_mlp.2", ""),
    "single_attn.to_qkv_mlp_proj": ("linear1", ""),
    "single_attn.to_out": ("linear2", ""),
    **{f"attn.to_{place}": ("img_attn.qkv", place) for place in "qkv"},
    **{f"attn.add_{place}_proj": ("txt_attn.qkv", place) for place in "qkv"},
    **{f"single_attn.to_{place}": ("linear1", place) for place in "qkv"},
}
FLUX_MLP_RATIO = 4
"""The rows of ``linear1`` of FLUX.1 that are of its feed-forward layer, as a multiple of those of its queries."""


def rename(
    lora: Mapping[str, Tensor], alphas: Mapping[str, float], family: str, denoiser: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the matrices under the names that other software reads, and the alpha of each layer.

    Args:
        lora: The matrices under diffusers' names.
        alphas: The alpha of each part of the pipeline.
        family: A key of `FORMATS`.
        denoiser: The config of the denoising network.

    Raises:
        ValueError: No name is known for a layer.
        KeyError: A matrix is missing.

    Source: kohya-ss/sd-scripts, networks/lora.py and lora_flux.py: names of diffusers for the U-Net of Stable Diffusion
        1.x and 2.x, and those of the original code for that of XL and for FLUX; kohya-ss/musubi-tuner for Qwen-Image;
        ComfyUI, comfy/lora.py, for Z-Image and Stable Diffusion 3, whose names are those of diffusers.
    """
    scheme = FORMATS[family]
    tensors: dict[str, Tensor] = {}
    layers: dict[tuple[str, str], dict[str, tuple[Tensor, Tensor]]] = {}
    for name, down in lora.items():
        path, is_down, _ = name.partition(".lora_A.")
        if not is_down:
            continue
        part, _, layer = path.partition(".")
        place = ""
        if part.startswith("text_encoder") and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"  # its name before transformers 5, which all readers expect
        elif part == "unet" and family == STABLE_DIFFUSION_XL:
            layer = original_name(layer, int(denoiser["layers_per_block"]))
        elif part == "transformer" and family in (FLUX_1, FLUX_2):
            layer, place = original_flux_name(layer)
        layers.setdefault((part, layer), {})[place] = down, lora[f"{path}.lora_B.weight"]
    for (part, layer), factors in layers.items():
        alpha, start = alphas[part], scheme.prefixes[part]
        name = start + layer.replace(".", start[-1])
        places = [""] if "" in factors else "qkv"
        down, up = _join([factors[place] for place in places])
        if family == FLUX_1 and layer.endswith("linear1"):
            up = F.pad(up, (0, 0, 0, FLUX_MLP_RATIO * len(factors["q"][1])))
        if scheme.has_alpha:
            tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
            tensors[f"{name}.alpha"] = torch.tensor(alpha * len(factors))
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up * (alpha / len(down))}
    return tensors


def _join(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the two factors of the change of one matrix, given those of each of its parts, one upon another.

    Its rank is the sum of theirs, and its second factor is block diagonal: each part keeps its own product.
    """
    downs, ups = zip(*factors, strict=True)
    return torch.cat(downs), torch.block_diag(*ups)  # type: ignore[no-untyped-call]


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


def original_flux_name(layer: str) -> tuple[str, str]:
    """Return the name of a layer of FLUX in its original code, and which part of that layer it is, "q", "k" or "v"."""
    match = _FLUX_BLOCK.fullmatch(layer)
    if not match or (match[1] or "") + match[3] not in _FLUX_LAYERS:
        raise ValueError(f"no name is known for {layer}")
    name, place = _FLUX_LAYERS[(match[1] or "") + match[3]]
    return f"{'single' if match[1] else 'double'}_blocks.{match[2]}.{name}", place


def describe(
    config: TrainingConfig,
    family: str,
    rank: int,
    alpha: float,
    name: str,
    *,
    word: str | None = None,
    denoiser: Mapping[str, Any] | None = None,
    prediction: str | None = None,
) -> dict[str, str]:
    """Return the metadata that readers show: the base, rank and alpha, and the words that call up the concept.

    Args:
        config: The config of the run.
        family: A key of `FORMATS`.
        rank: The rank of the matrices.
        alpha: Their alpha.
        name: The name of the file, without its suffix.
        word: What the programs that read the file call the new word, if there is one: the name of its embedding's file.
        denoiser: The config of the denoising network, by which readers sort models of one family.
        prediction: What the denoising network predicts, as the config of its scheduler says.

    Source: kohya-ss/sd-scripts and musubi-tuner, and the Stability AI model metadata specification for ``modelspec``.
    """
    trigger = word or config.placeholder_token or str(config.instance_prompt)
    version, architecture = _name_base(family, denoiser or {}, prediction)
    hint = f"prompts need the embedding of {config.placeholder_token}, which is called by the name of its file"
    return {
        **({"ss_v2": "True"} if version.startswith("sd_v2") else {}),
        "ss_network_module": FORMATS[family].module,
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": version,
        "ss_resolution": f"({config.resolution}, {config.resolution})",
        "ss_output_name": name,
        "ss_tag_frequency": json.dumps({"concept": {trigger: 1}}),
        "ss_seed": str(config.seed),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": FORMATS[family].implementation,
        "modelspec.title": name,
        "modelspec.trigger_phrase": trigger,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        **({"modelspec.usage_hint": hint} if config.placeholder_token else {}),
        **({"modelspec.prediction_type": _PREDICTIONS[prediction]} if prediction in _PREDICTIONS else {}),
    }


def _name_base(family: str, denoiser: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
    """Return what readers call a base model, by version and by architecture."""
    version, architecture = FORMATS[family].version, FORMATS[family].architecture
    if family == STABLE_DIFFUSION and denoiser.get("cross_attention_dim") == _WIDTH_OF_2:
        velocity = prediction == "v_prediction"
        return ("sd_v2_v", "stable-diffusion-v2-768-v") if velocity else ("sd_v2", "stable-diffusion-v2-512")
    if family == STABLE_DIFFUSION_3:
        medium = "5-medium" if denoiser.get("dual_attention_layers") else "m"
        return version, f"{architecture}-{'5-large' if denoiser.get('num_layers') == _LAYERS_OF_LARGE else medium}"
    if family == FLUX_1:
        return version, f"{architecture}-{'dev' if denoiser.get('guidance_embeds') else 'schnell'}"
    if family == FLUX_2:
        size = "9b" if denoiser.get("joint_attention_dim") == _WIDTH_OF_9B else "4b"
        return f"{version}_{size}", f"{architecture}-{size}"
    return version, architecture
