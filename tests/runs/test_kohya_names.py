"""LoRA files for other software: stock diffusers reads the matrices of the run from them, and draws its image."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvar.config.methods import DreamBoothLoraConfig
from dvar.diffusion.sampling import sample
from dvar.errors import RefusedInput
from dvar.runs.export import write_kohya_lora
from dvar.runs.kohya import FLUX_1, FORMATS, describe, rename
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import (
    tiny_concept,
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_z_image_pipeline,
)
from dvar.training.personalise import personalise
from dvar.training.run_layout import LORA

PROMPT = "a photo of mug"
# Of the blocks of FLUX.1 that read image and text as one, diffusers' loader knows those of full width alone.
MODELS: dict[str, tuple[Callable[[Path], Path], str, bool]] = {
    "Stable Diffusion 3": (tiny_sd3_pipeline, "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", True),
    "FLUX.1": (partial(tiny_flux_pipeline, single_layers=0), "lora_unet_double_blocks_0_img_attn_qkv.alpha", True),
    "FLUX.2 klein": (tiny_klein_pipeline, "lora_unet_single_blocks_0_linear1.lora_down.weight", False),
    "Z-Image": (tiny_z_image_pipeline, "diffusion_model.layers.0.attention.to_out.0.lora_up.weight", False),
    "Qwen-Image": (tiny_qwen_image_pipeline, "lora_unet_transformer_blocks_0_attn_to_out_0.alpha", False),
}


def train(model: Path, folder: Path, *, text: bool) -> Path:
    """Return a run whose matrices are all other than zero."""
    config = DreamBoothLoraConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(tiny_concept(folder / "images")),
        instance_prompt=PROMPT,
        resolution=32,
        learning_rate=5e-2,
        train_batch_size=1,
        eval_batch_size=2,
        max_train_steps=9,
        window=8,
        threshold=1e-9,
        validation_steps=9,
        num_validation_images=1,
        num_inference_steps=2,
        rank=4,
        lora_alpha=2,
        train_text_encoder=text,
        output_dir=str(folder / "run"),
    )
    run = personalise(config).folder
    with safe_open(run / LORA, "pt") as file:
        metadata = file.metadata()
    generator = torch.Generator().manual_seed(1)  # some matrices have no gradient in the last block, and would be zero
    tensors = {
        name: part + 0.1 * torch.randn(part.shape, generator=generator) for name, part in load_file(run / LORA).items()
    }
    save_file(tensors, run / LORA, metadata)
    return run


def products(matrices: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return what a LoRA adds to each matrix."""
    downs = {name.partition(".lora_A.")[0]: part for name, part in matrices.items() if ".lora_A." in name}
    return {name: scale * matrices[f"{name}.lora_B.weight"] @ down for name, down in downs.items()}


def loaded_products(pipeline: Any) -> dict[str, Tensor]:
    """Return what a LoRA that stock diffusers has loaded adds to each matrix."""
    layers = {
        f"{part}.{'text_model.' * part.startswith('text') + name.removeprefix('text_model.')}": layer
        for part in ("transformer", "text_encoder", "text_encoder_2")
        if hasattr(pipeline, part)
        for name, layer in getattr(pipeline, part).named_modules()
        if hasattr(layer, "lora_A")
    }
    return {
        name: layer.scaling["default_0"] * layer.lora_B["default_0"].weight.detach() @ layer.lora_A["default_0"].weight
        for name, layer in layers.items()
    }


@pytest.mark.parametrize(
    ("family", "denoiser", "prediction", "version", "architecture"),
    [
        ("Stable Diffusion", {"cross_attention_dim": 768}, "epsilon", "sd_v1", "stable-diffusion-v1"),
        ("Stable Diffusion", {"cross_attention_dim": 1024}, "epsilon", "sd_v2", "stable-diffusion-v2-512"),
        ("Stable Diffusion", {"cross_attention_dim": 1024}, "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v"),
        ("Stable Diffusion 3", {"num_layers": 24}, None, "sd3", "stable-diffusion-3-m"),
        (
            "Stable Diffusion 3",
            {"num_layers": 24, "dual_attention_layers": [0]},
            None,
            "sd3",
            "stable-diffusion-3-5-medium",
        ),
        ("Stable Diffusion 3", {"num_layers": 38}, None, "sd3", "stable-diffusion-3-5-large"),
        ("FLUX.1", {"guidance_embeds": True}, None, "flux1", "flux-1-dev"),
        ("FLUX.1", {"guidance_embeds": False}, None, "flux1", "flux-1-schnell"),
        ("FLUX.2 klein", {"joint_attention_dim": 7680}, None, "flux_2_klein_4b", "Flux.2-klein-4b"),
        ("FLUX.2 klein", {"joint_attention_dim": 12288}, None, "flux_2_klein_9b", "Flux.2-klein-9b"),
    ],
)
def test_each_model_of_a_family_has_its_name(
    family: str, denoiser: dict[str, Any], prediction: str | None, version: str, architecture: str
) -> None:
    config = DreamBoothLoraConfig(instance_prompt=PROMPT)
    metadata = describe(config, family, 4, 2.0, "mug", denoiser=denoiser, prediction=prediction)
    assert metadata["ss_base_model_version"] == version
    assert metadata["modelspec.architecture"] == f"{architecture}/lora"
    assert metadata.get("ss_v2") == ("True" if version.startswith("sd_v2") else None)
    assert metadata.get("modelspec.prediction_type") == {"epsilon": "epsilon", "v_prediction": "v"}.get(
        prediction or ""
    )


def test_the_trigger_is_what_readers_call_the_word() -> None:
    config = DreamBoothLoraConfig(placeholder_token="<my-mug>")
    by_word = describe(config, "Stable Diffusion", 4, 2.0, "mug", word="my-mug-word")
    assert by_word["modelspec.trigger_phrase"] == "my-mug-word"
    assert json.loads(by_word["ss_tag_frequency"]) == {"concept": {"my-mug-word": 1}}
    assert "embedding of <my-mug>" in by_word["modelspec.usage_hint"]
    assert "modelspec.usage_hint" not in describe(
        DreamBoothLoraConfig(instance_prompt=PROMPT), "Stable Diffusion", 4, 2.0, "mug"
    )


def generate(pipeline: Any) -> Any:
    options: dict[str, Any] = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "pil"}
    options |= {"generator": torch.Generator().manual_seed(5)}
    qwen = type(pipeline).__name__.startswith("Qwen")
    options |= {"true_cfg_scale": 4.0, "negative_prompt": " "} if qwen else {"guidance_scale": 4.0}
    return np.asarray(pipeline(prompt=PROMPT, **options).images[0], dtype=np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_stock_diffusers_reads_the_matrices_of_the_run_and_draws_its_image(family: str, tmp_path: Path) -> None:
    save, key, text = MODELS[family]
    model = save(tmp_path / "model")
    run = train(model, tmp_path, text=text)
    file = write_kohya_lora(run, tmp_path / "mug.safetensors")
    assert key in load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2"
    assert metadata["ss_base_model_version"] == FORMATS[family].version + "_4b" * (family == "FLUX.2 klein")
    assert metadata["modelspec.trigger_phrase"] == PROMPT
    assert str(tmp_path) not in json.dumps(metadata)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "Stable Diffusion 3" else {}
    stock = DiffusionPipeline.from_pretrained(model, **absent)
    stock.set_progress_bar_config(disable=True)
    base = generate(stock)
    stock.load_lora_weights(str(tmp_path), weight_name=file.name)
    ours, theirs = products(load_file(run / LORA), 0.5), loaded_products(stock)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("text_encoder.") for name in ours) == text
    for name, product in ours.items():
        assert product.count_nonzero() == product.numel(), name
        torch.testing.assert_close(theirs[name].detach(), product, rtol=1e-5, atol=1e-8)
    backbone = load_personalised_backbone(run, device="cpu")
    (image,) = sample(backbone, [PROMPT], [5], size=32, steps=2, guidance=4.0)
    pixels = generate(stock)
    assert np.abs(pixels - np.asarray(image, dtype=np.int64)).max() <= 1
    assert np.abs(pixels - base).max() > 1


def test_diffusers_reads_the_blocks_of_flux_of_full_width(tmp_path: Path) -> None:
    """Of the blocks that read image and text as one, which an image of a tiny model cannot test."""
    generator = torch.Generator().manual_seed(0)
    paths = [f"transformer.single_transformer_blocks.37.attn.to_{part}" for part in "qkv"]
    lora = {
        f"{path}.{side}.weight": torch.randn(shape, generator=generator)
        for path in paths
        for side, shape in (("lora_A", (2, 3072)), ("lora_B", (3072, 2)))
    }
    tensors = rename(lora, {"transformer": 1.0}, FLUX_1, {})
    assert {name: tuple(part.shape) for name, part in tensors.items()} == {
        "lora_unet_single_blocks_37_linear1.lora_down.weight": (6, 3072),
        "lora_unet_single_blocks_37_linear1.lora_up.weight": (3 * 3072 + 12288, 6),
        "lora_unet_single_blocks_37_linear1.alpha": (),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    loaded = products(FluxPipeline.lora_state_dict(str(tmp_path), weight_name="lora.safetensors"), 1.0)
    feed_forward = loaded.pop("transformer.single_transformer_blocks.37.proj_mlp")
    assert not feed_forward.any()
    ours = products(lora, 0.5)
    assert loaded.keys() == ours.keys()
    for name, product in ours.items():
        torch.testing.assert_close(loaded[name], product, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", ["to_k", "another layer"])
def test_a_lora_of_flux_that_lacks_a_part_or_has_a_strange_one_is_not_renamed(missing: str) -> None:
    layers = ["to_q", "to_v"] if missing == "to_k" else ["to_q", "to_k", "to_v", "norm"]
    lora = {
        f"transformer.transformer_blocks.0.attn.{layer}.{side}.weight": torch.ones(2, 2)
        for layer in layers
        for side in ("lora_A", "lora_B")
    }
    with pytest.raises((KeyError, ValueError), match=r"k|no name is known for transformer_blocks.0.attn.norm"):
        rename(lora, {"transformer": 1.0}, FLUX_1, {})


def test_a_family_without_such_names_is_refused_with_the_list(tmp_path: Path) -> None:
    config = DreamBoothLoraConfig(instance_prompt=PROMPT, instance_data_dir="images")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    result = {"verdict": {}, "steps": 1, "exported_step": 1, "seconds": {}, "weights": [LORA]}
    result |= {"family": "Latent Diffusion", "base_sha256": ""}
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(RefusedInput, match=r"--kohya knows the names of Stable Diffusion, .*, Qwen-Image alone, and"):
        write_kohya_lora(tmp_path, tmp_path / "lora.safetensors")
