"""Methods on every family of base models: they train, their files load in stock diffusers, and the images agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig, TextualInversionConfig
from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.sampling import sample
from dvar.errors import RefusedInput
from dvar.runs.export import write_kohya_lora, write_merged_pipeline
from dvar.runs.load_model import load_personalised_backbone
from dvar.testing import tiny_concept, tiny_sd3_pipeline, tiny_xl_pipeline
from dvar.training.loading_code import load_lines
from dvar.training.methods.dreambooth_lora import DreamBoothLora
from dvar.training.personalise import personalise

MODELS: dict[str, Callable[..., Path]] = {"xl": tiny_xl_pipeline, "sd3": tiny_sd3_pipeline}
LEARNED = {
    "textual-inversion": {"learned_clip_embeds.safetensors"},
    "dreambooth-lora": {"learned_clip_embeds.safetensors", "pytorch_lora_weights.safetensors"},
    "custom-diffusion": {"learned_clip_embeds.safetensors", "custom_diffusion_weights.safetensors"},
}


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


def load_stock(model: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if (model / "transformer").exists() else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(model, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: Any, prompt: str) -> np.ndarray[Any, Any]:
    generator = torch.Generator().manual_seed(5)
    image = pipeline(
        prompt, height=32, width=32, num_inference_steps=2, guidance_scale=7.5, generator=generator
    ).images[0]
    return np.asarray(image, dtype=np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TextualInversionConfig, DreamBoothLoraConfig, CustomDiffusionConfig])
def test_what_is_learned_loads_in_stock_diffusers_and_gives_the_same_image(
    kind: type[TrainingConfig], model: Path, images: Path, tmp_path: Path
) -> None:
    own = {"class_noun": "mug", "num_class_images": 2} if kind is CustomDiffusionConfig else {}
    config = build_config(kind, model, images, tmp_path / "run", **own)
    if kind is CustomDiffusionConfig and (model / "transformer").exists():
        with pytest.raises(RefusedInput, match="custom-diffusion trains the cross-attention of a U-Net"):
            personalise(config)
        return
    run = personalise(config).folder
    names = {path.name for path in run.glob("*.safetensors") if "-steps-" not in path.name}
    assert names == LEARNED[kind.method]
    backbone = load_personalised_backbone(run, device="cpu")
    (ours,) = sample(backbone, ["a photo of <thing>"], [5], size=32, steps=2)
    pipeline = load_stock(model)
    plain = generate(pipeline, "a photo of mug")
    family = json.loads((run / "result.json").read_text())["family"]
    scope = {"pipeline": pipeline, "load_file": load_file}
    for line in load_lines(names, str(run), "<thing>", family):
        exec(line, scope)  # as the model card and the report print it
    theirs = generate(pipeline, "a photo of <thing>")
    assert np.abs(theirs - np.asarray(ours, dtype=np.int64)).max() <= 1
    assert np.abs(theirs - plain).max() > 1
    merged = generate(load_stock(write_merged_pipeline(run, tmp_path / "merged")), "a photo of <thing>")
    assert np.abs(merged - theirs).max() <= 1
    with pytest.raises(RefusedInput, match="--kohya"):
        write_kohya_lora(run, tmp_path / "lora.safetensors")


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
