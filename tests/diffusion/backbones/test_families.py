"""Families of base models: what is refused by name, before weights are read or when they load, and their noise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.families import BACKBONES, find_family
from dvar.diffusion.model_files import model_problems
from dvar.diffusion.objective import Encoded, draw
from dvar.diffusion.source import ModelSource
from dvar.diffusion.timesteps import LOGIT_NORMAL
from dvar.errors import ModelError
from dvar.testing import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ldm_pipeline,
    tiny_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)

Save = Callable[..., Path]


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("save", "kind"),
    [
        (tiny_pipeline, "uniform"),
        (tiny_sd3_pipeline, "logit-normal"),
        (tiny_flux_pipeline, "uniform"),
        (tiny_klein_pipeline, "uniform"),
        (tiny_z_image_pipeline, "uniform"),
        (tiny_qwen_image_pipeline, "uniform"),
    ],
)
def test_noise_levels_are_drawn_as_in_diffusers_script_of_the_family(save: Save, kind: str, tmp_path: Path) -> None:
    """By the default of its --weighting_scheme: "none" is uniform, and that of Stable Diffusion 3 "logit_normal"."""
    assert load_backbone(save(tmp_path / "model"), device="cpu").schedule.density.kind == kind


def test_timesteps_of_a_logit_normal_density() -> None:
    examples = Encoded(torch.randn(1, 1, 8, 2, 2), [torch.zeros(1, 4, dtype=torch.int64)])
    draws = draw(examples, timesteps=1000, seed=1, stream="train", count=4000, density=LOGIT_NORMAL)
    # The quartiles of the sigmoid of a standard Gaussian are sigmoid(-0.6745), 0.5 and sigmoid(0.6745).
    quartiles = torch.quantile(draws.timesteps.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    torch.testing.assert_close(quartiles, torch.tensor([337.5, 500.0, 662.5], dtype=torch.float64), rtol=0, atol=20)


@pytest.mark.parametrize("save", [tiny_xl_pipeline, tiny_sd3_pipeline, tiny_flux_pipeline])
def test_a_model_that_lacks_a_text_encoder_is_refused(save: Save, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    edit(folder / "model_index.json", text_encoder_2=[None, None], tokenizer_2=[None, None])
    (problem,) = model_problems(str(folder))
    assert "lacks text_encoder_2, tokenizer_2: name a folder that save_pretrained wrote" in problem
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ModelError, match="text_encoder_2"):
        load_backbone(folder, device="cpu")


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3"])
def test_a_stable_diffusion_3_that_names_t5_and_lacks_it_is_refused(part: str, tmp_path: Path) -> None:
    folder = tiny_sd3_pipeline(tmp_path / "model", t5=True)
    assert model_problems(str(folder)) == []
    shutil.rmtree(folder / part)
    (problem,) = model_problems(str(folder))
    assert f"is no whole Stable Diffusion 3 or 3.5, it lacks {part}: name a folder that save_pretrained" in problem
    edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    assert model_problems(str(folder)) == []


def test_a_stable_diffusion_3_whose_t5_is_damaged_or_a_pickle_is_refused(tmp_path: Path) -> None:
    folder = tiny_sd3_pipeline(tmp_path / "model", t5=True)
    (weights,) = (folder / "text_encoder_3").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    (problem,) = model_problems(str(folder))
    assert "text_encoder_3/model.safetensors is damaged" in problem
    weights.rename(weights.with_name("pytorch_model.bin"))
    (problem,) = model_problems(str(folder))
    assert "text_encoder_3 has no .safetensors weights, only pytorch_model.bin, which is never read" in problem


def test_a_variant_may_be_in_several_files(tmp_path: Path) -> None:
    """As T5 of Stable Diffusion 3 on the hub, by the names of transformers."""
    folder = tiny_sd3_pipeline(tmp_path / "model", t5=True)
    for file in folder.glob("*/*.safetensors"):
        number = "-00001-of-00001" if file.parent.name == "text_encoder_3" else ""
        file.rename(file.with_name(f"{file.stem}.fp16{number}.safetensors"))
    assert model_problems(ModelSource(str(folder), variant="fp16")) == []


def test_a_stable_diffusion_3_with_a_t5_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = tiny_sd3_pipeline(tmp_path / "model", t5=True)
    edit(folder / "text_encoder_3" / "config.json", d_model=32)
    (problem,) = model_problems(str(folder))
    assert "transformer.joint_attention_dim must be 32, the sum of text_encoder_3.d_model, got 64" in problem


@pytest.mark.parametrize(
    ("save", "donor", "part", "message"),
    [
        (tiny_pipeline, tiny_sd3_pipeline, "text_encoder", None),  # a CLIP of the same size fits
        (tiny_pipeline, tiny_xl_pipeline, "unet", "unet.cross_attention_dim must be 32, the sum of text_encoder.hid"),
        (tiny_pipeline, tiny_klein_pipeline, "text_encoder", "text_encoder must be a clip_text_model in a Stable Dif"),
        (tiny_pipeline, tiny_klein_pipeline, "vae", "vae must be a AutoencoderKL in a Stable Diffusion 1.x or 2.x, g"),
        (tiny_flux_pipeline, tiny_sd3_pipeline, "transformer", "transformer must be a FluxTransformer2DModel in a FL"),
        (tiny_flux_pipeline, tiny_xl_pipeline, "text_encoder_2", "text_encoder_2 must be a t5 in a FLUX.1, got a cli"),
        (tiny_ldm_pipeline, tiny_xl_pipeline, "unet", "unet.cross_attention_dim must be 32, the sum of bert.d_mod"),
    ],
)
def test_a_folder_of_several_models_is_refused_before_weights_are_read(
    save: Save, donor: Save, part: str, message: str | None, tmp_path: Path
) -> None:
    folder, other = save(tmp_path / "model"), donor(tmp_path / "other")
    assert model_problems(str(folder)) == []
    shutil.rmtree(folder / part)
    shutil.copytree(other / part, folder / part)
    problems = model_problems(str(folder))
    assert len(problems) == (message is not None)
    if message:
        assert message in problems[0]
        assert problems[0].endswith("the folder is of several models, copy the model again")
        assert "\n" not in problems[0]


def test_a_unet_for_inpainting_is_refused(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    edit(folder / "unet" / "config.json", in_channels=9)
    (problem,) = model_problems(str(folder))
    assert "unet.in_channels must be 4, the sum of vae.latent_channels, got 9" in problem


@pytest.mark.parametrize(
    ("pipeline", "kind"),
    [
        ("StableDiffusionImg2ImgPipeline", "which starts from an image: choose"),
        ("StableDiffusionXLInpaintPipeline", "which starts from an image: choose"),
        ("FluxKontextPipeline", "which starts from an image: choose"),
        ("QwenImageEditPipeline", "which starts from an image: choose"),
        ("StableVideoDiffusionPipeline", "which makes videos: choose"),
        ("WanPipeline", "which makes videos: choose"),
        ("WanImageToVideoPipeline", "which makes videos: choose"),
        ("LTXPipeline", "which makes videos: choose"),
        ("SanaPipeline", "is a SanaPipeline: choose"),
        *(
            (name, "which makes videos: choose")
            for name in ("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline", "Cosmos2VideoToWorldPipeline")
        ),
        *(
            (name, f"is a {name}: choose")
            for name in ("HunyuanDiTPipeline", "HunyuanImagePipeline", "Cosmos2TextToImagePipeline")
        ),
    ],
)
def test_another_kind_of_pipeline_is_refused_by_name_with_the_list(pipeline: str, kind: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    edit(folder / "model_index.json", _class_name=pipeline)
    (problem,) = model_problems(str(folder))
    assert f"is a {pipeline}" in problem
    assert kind in problem
    assert all(entry.title in problem for entry in BACKBONES.values())
    with pytest.raises(ModelError, match=kind):
        find_family("a model", pipeline)
