"""Methods on families of base models: what they adapt, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import load_backbone
from dvar.errors import RefusedInput
from dvar.runs.export import write_kohya_lora
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import (
    tiny_concept,
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ldm_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from dvar.training.methods.custom_diffusion import CustomDiffusion
from dvar.training.methods.dreambooth_lora import DreamBoothLora
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.personalise import personalise

ONE_VECTOR = (
    "num_vectors must be 1 on a {}, whose pipeline does not write out several tokens for every text encoder, got 2: "
    "drop it"
)
MODELS: dict[str, Callable[..., Path]] = {"xl": tiny_xl_pipeline, "sd3": tiny_sd3_pipeline}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_concept(tmp_path_factory.mktemp("images") / "images")


def build_config(kind: type[TrainingConfig], model: Path, images: Path, folder: Path, **changes: Any) -> TrainingConfig:
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": str(model),
        "instance_data_dir": str(images),
        "placeholder_token": "<thing>",
        "initializer_token": "mug",
        "resolution": 32,
        "learning_rate": 5e-2,
        "max_train_steps": 9,
        "window": 8,
        "threshold": 1e-9,
        "validation_steps": 9,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "output_dir": str(folder),
    }
    return kind(**{**shared, **changes})


def test_a_kohya_file_of_xl_gives_stock_diffusers_the_image_of_the_run(images: Path, tmp_path: Path) -> None:
    model = tiny_xl_pipeline(tmp_path / "model")
    changes: dict[str, Any] = {"placeholder_token": None, "initializer_token": None, "lora_alpha": 2, "rank": 4}
    changes |= {"instance_prompt": "a photo of mug", "train_text_encoder": True}
    run = personalise(build_config(DreamBoothLoraConfig, model, images, tmp_path / "run", **changes)).folder
    file = write_kohya_lora(run, tmp_path / "mug.safetensors")
    tensors = load_file(file)
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight" in tensors
    assert "lora_unet_output_blocks_3_1_transformer_blocks_0_attn2_to_v.alpha" in tensors
    starts = {name.split("_text_model")[0] for name in tensors if name.startswith("lora_te")}
    assert starts == {"lora_te1", "lora_te2"}
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["ss_network_dim"] == "4"
    assert metadata["ss_network_alpha"] == "2"
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata["modelspec.trigger_phrase"] == "a photo of mug"
    assert str(tmp_path) not in json.dumps(metadata)

    def generate(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(3)
        options = {"num_inference_steps": 2, "height": 32, "width": 32, "guidance_scale": 4.0}
        return np.asarray(pipeline("a photo of mug", generator=generator, **options).images[0], dtype=np.int64)

    ours = generate(load_personalised_backbone(run, device="cpu").pipeline())
    stock = StableDiffusionXLPipeline.from_pretrained(model, add_watermarker=False)
    base = generate(stock)
    stock.load_lora_weights(file)
    theirs = generate(stock)
    assert np.abs(theirs - ours).max() <= 1
    assert np.abs(theirs - base).max() > 1


def test_a_language_model_learns_no_word_and_is_not_adapted(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_z_image_pipeline(tmp_path / "model"), device="cpu")
    with pytest.raises(RefusedInput, match="placeholder_token cannot be learned on a Z-Image, whose text encoder is"):
        TextualInversion(backbone, "<thing>", "mug")
    with pytest.raises(RefusedInput, match="train_text_encoder adapts a CLIP, and a Z-Image has none: drop it"):
        DreamBoothLora(backbone, text_encoder=True)


@pytest.mark.parametrize(
    ("save", "kind", "changes", "message"),
    [
        (tiny_ldm_pipeline, TextualInversionConfig, {"num_vectors": 2}, ONE_VECTOR.format("Latent Diffusion")),
        (tiny_sd3_pipeline, TextualInversionConfig, {"num_vectors": 2}, ONE_VECTOR.format("Stable Diffusion 3 or 3.5")),
        (tiny_flux_pipeline, DreamBoothLoraConfig, {"num_vectors": 2}, ONE_VECTOR.format("FLUX.1")),
        (
            tiny_xl_pipeline,
            CustomDiffusionConfig,
            {"placeholder_token": "<one>+<two>", "initializer_token": "mug+cat", "validation_prompt": "a <one> <two>"},
            "custom-diffusion learns one concept at a time on a Stable Diffusion XL, got 2: train them one by one",
        ),
    ],
)
def test_what_a_family_cannot_learn_is_refused_before_it_loads(
    save: Callable[..., Path],
    kind: type[TrainingConfig],
    changes: dict[str, Any],
    message: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dvar.training.personalise.load_backbone", None)
    if kind is CustomDiffusionConfig:
        prompts = {"instance_prompt": "a <one> <two>", "class_prompt": "mug", "instance_data_dir": str(images)}
        (tmp_path / "list.json").write_text(json.dumps([prompts]))
        changes = {**changes, "concepts_list": str(tmp_path / "list.json"), "instance_data_dir": None}
    with pytest.raises(RefusedInput) as error:
        personalise(build_config(kind, save(tmp_path / "model"), images, tmp_path / "run", **changes))
    assert error.value.problems == (message,)


def test_custom_diffusion_itself_refuses_several_concepts_with_several_text_encoders(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_xl_pipeline(tmp_path / "xl"), device="cpu")
    with pytest.raises(RefusedInput, match="custom-diffusion learns one concept at a time on a Stable Diffusion XL"):
        CustomDiffusion(backbone, {"<one>": "mug", "<two>": "cat"})


def test_default_matrices_of_klein_are_those_of_both_kinds_of_blocks(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_klein_pipeline(tmp_path / "model"), device="cpu")
    adapted = {name.removeprefix("transformer.").partition(".lora_")[0] for name in DreamBoothLora(backbone).matrices}
    double = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert adapted == {*double, *(f"single_transformer_blocks.0.attn.{name}" for name in ("to_qkv_mlp_proj", "to_out"))}


def test_adapting_the_text_encoder_of_flux_adapts_clip_and_not_t5(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_flux_pipeline(tmp_path / "model"), device="cpu")
    prefixes = {name.partition(".")[0] for name in DreamBoothLora(backbone, text_encoder=True).matrices}
    assert prefixes == {"transformer", "text_encoder"}


def test_every_text_encoder_learns_its_own_vector(model: Path, images: Path, tmp_path: Path) -> None:
    run = personalise(build_config(TextualInversionConfig, model, images, tmp_path / "run")).folder
    vectors = load_file(run / "learned_clip_embeds.safetensors")
    assert vectors.keys() == {"clip_l", "clip_g"}
    backbone = load_backbone(model, device="cpu")
    for tower, key in zip(backbone.towers, ("clip_l", "clip_g"), strict=True):
        word = tower.encoder.get_input_embeddings().weight[tower.tokenizer.convert_tokens_to_ids("mug</w>")]
        assert vectors[key].shape == (1, 32)
        assert not torch.allclose(vectors[key][0], word, atol=1e-3)


def test_a_target_that_a_family_lacks_is_refused(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_sd3_pipeline(tmp_path / "model"), device="cpu")
    with pytest.raises(
        RefusedInput, match="lora_targets of Stable Diffusion 3 must be one of attention, got 'cross-att"
    ):
        DreamBoothLora(backbone, targets="cross-attention")


def test_lora_adapts_the_text_of_a_transformers_attention_too(tmp_path: Path) -> None:
    backbone = load_backbone(tiny_sd3_pipeline(tmp_path / "model"), device="cpu")
    names = DreamBoothLora(backbone).matrices
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)
    assert any(".add_q_proj." in name for name in names)
