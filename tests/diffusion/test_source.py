"""Where a base model is: single files, hub ids in the cache, variants; and what is refused before weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from single_files import write_single_file, write_single_file_of_3
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from dvar.cluster.program import PASSING
from dvar.config.methods import DreamBoothLoraConfig
from dvar.diffusion import source as sources
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.model_files import model_problems
from dvar.diffusion.single_file import find_kind
from dvar.diffusion.source import ModelSource
from dvar.errors import ModelError, RefusedInput, UnreachableModel
from dvar.runs.load_model import load_personalised_backbone, load_result
from dvar.testing import tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline
from dvar.testing.model_card import run_model_card
from dvar.training.personalise import personalise
from dvar.training.pipeline_code import load_pipeline_code

WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")


def save_file_of(folder: Path, file: Path, *, text: bool = True) -> Path:
    return write_single_file(load_backbone(folder, device="cpu").pipeline(), file, text=text)


def strip_weights(folder: Path, *parts: str) -> Path:
    """Leave the configs and tokenizers of a model's folder, and the weights of all parts but these."""
    for part in parts:
        for file in (folder / part).glob("*.safetensors"):
            file.unlink()
    return folder


def config_of(images: Path, folder: Path, **changes: Any) -> DreamBoothLoraConfig:
    shared: dict[str, Any] = {
        "instance_data_dir": str(images),
        "instance_prompt": "a photo of mug",
        "resolution": 32,
        "max_train_steps": 9,
        "window": 8,
        "threshold": 1e-9,
        "num_inference_steps": 2,
        "num_validation_images": 1,
        "output_dir": str(folder),
    }
    return DreamBoothLoraConfig(**{**shared, **changes})


# --- single files ---------------------------------------------------------------------------------------------------


def test_a_single_file_is_the_model_of_the_folder_that_it_came_from(tmp_path: Path, tiny_images: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "v_prediction"}))
    file, digest = save_file_of(folder, tmp_path / "model.safetensors"), load_backbone(folder, device="cpu").digest
    configs = strip_weights(folder, "unet", "vae", "text_encoder")
    source = ModelSource(str(file), single_file_config=str(configs))
    assert model_problems(source) == []
    assert load_backbone(source, device="cpu").digest == digest
    config = config_of(
        tiny_images,
        tmp_path / "run",
        pretrained_model_name_or_path=str(file),
        single_file_config=str(configs),
        max_train_steps=9,
    )
    run = personalise(config).folder
    card = (run / "README.md").read_text()
    assert 'StableDiffusionPipeline.from_single_file("model.safetensors", config="model")\n' in card
    assert str(tmp_path) not in card
    assert run_model_card(run, file, configs).scheduler.config.prediction_type == "v_prediction"
    assert load_personalised_backbone(run, device="cpu").digest == digest


def test_the_card_loads_the_text_encoders_that_a_single_file_lacks(tmp_path: Path, tiny_images: Path) -> None:
    """They may be stored in half precision, and the rest is loaded in float32."""
    folder = tiny_xl_pipeline(tmp_path / "model")
    file = save_file_of(folder, tmp_path / "model.safetensors", text=False)
    for part in ("text_encoder", "text_encoder_2"):
        weights = folder / part / "model.safetensors"
        save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    places = {
        "pretrained_model_name_or_path": str(file),
        "single_file_config": str(strip_weights(folder, "unet", "vae")),
    }
    run = personalise(config_of(tiny_images, tmp_path / "run", **places)).folder
    card = (run / "README.md").read_text()
    assert (
        "from diffusers import StableDiffusionXLPipeline\nfrom transformers import CLIPTextModel, CLIPTextModelW"
        in card
    )
    assert str(tmp_path) not in card
    pipeline, backbone = (
        run_model_card(run, file, folder),
        load_backbone(ModelSource.of(load_result(run)[0]), device="cpu"),
    )
    for tower in backbone.towers:
        for name, tensor in getattr(pipeline, tower.name).state_dict().items():
            assert torch.equal(tensor, tower.encoder.state_dict()[name]), name


def test_text_encoders_that_a_single_file_lacks_come_from_the_folder_of_its_configs(tmp_path: Path) -> None:
    folder = tiny_xl_pipeline(tmp_path / "model")
    file = save_file_of(folder, tmp_path / "model.safetensors", text=False)
    digest = load_backbone(folder, device="cpu").digest
    source = ModelSource(str(file), single_file_config=str(strip_weights(folder, "unet", "vae")))
    assert model_problems(source) == []
    assert load_backbone(source, device="cpu").digest == digest
    strip_weights(folder, "text_encoder_2")
    (problem,) = model_problems(source)
    assert "model.safetensors lacks text_encoder, text_encoder_2" not in problem
    assert "lacks text_encoder_2, and so does single_file_config" in problem


def save_file_of_3(folder: Path, file: Path, *, t5: bool, **options: Any) -> tuple[Path, str]:
    """Return a single file of the Stable Diffusion 3 in a folder, whose CLIPs it makes differ in width, and a digest.

    By their width diffusers tells them apart, and takes the projection of the first for the identity.
    """
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    settings = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    narrow = CLIPTextConfig.from_dict(pipeline.text_encoder.config.to_dict() | settings)
    encoder = CLIPTextModelWithProjection(narrow).eval()
    encoder.text_projection.weight.data = torch.eye(16)
    encoder.save_pretrained(folder / "text_encoder")
    pipeline.text_encoder = encoder
    return write_single_file_of_3(pipeline, file, **options), load_backbone(folder, device="cpu").digest


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_a_single_file_of_3_without_text_is_the_model_of_the_folder(prefix: str, tmp_path: Path) -> None:
    folder = tiny_sd3_pipeline(tmp_path / "model")
    file, digest = save_file_of_3(folder, tmp_path / "model.safetensors", t5=False, text=False, prefix=prefix)
    source = ModelSource(str(file), single_file_config=str(strip_weights(folder, "transformer", "vae")))
    assert model_problems(source) == []
    backbone = load_backbone(source, device="cpu")
    assert backbone.digest == digest
    assert [tower.name for tower in backbone.towers] == ["text_encoder", "text_encoder_2"]
    strip_weights(folder, "text_encoder_2")
    (problem,) = model_problems(source)
    assert "lacks text_encoder_2, and so does single_file_config" in problem


def test_a_whole_single_file_of_3_is_the_model_of_the_folder(tmp_path: Path) -> None:
    folder = tiny_sd3_pipeline(tmp_path / "model", t5=True)
    file, digest = save_file_of_3(folder, tmp_path / "model.safetensors", t5=True, text=True)
    parts = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    source = ModelSource(str(file), single_file_config=str(strip_weights(folder, *parts)))
    assert model_problems(source) == []
    assert load_backbone(source, device="cpu").digest == digest
    assert find_kind(file).configs == "stabilityai/stable-diffusion-3-medium-diffusers"
    change(file, model__diffusion_model__pos_embed=torch.zeros(1, 384 * 384, 32))
    assert find_kind(file).configs == "stabilityai/stable-diffusion-3.5-medium"
    change(file, model__diffusion_model__joint_blocks__37__x_block__mlp__fc1__weight=torch.zeros(1, 1))
    assert find_kind(file).configs == "stabilityai/stable-diffusion-3.5-large"


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("double_blocks.0.img_attn.norm.key_norm.scale", "FLUX.1, or of a model made from it that looks the same"),
        ("model.diffusion_model.double_stream_modulation_img.lin.weight", "FLUX.2"),
        ("model.diffusion_model.cap_embedder.1.weight", "Z-Image"),
    ],
)
def test_families_whose_single_files_are_not_read_are_refused_by_name(name: str, title: str, tmp_path: Path) -> None:
    save_file({name: torch.zeros(1, 1)}, tmp_path / "model.safetensors")
    (problem,) = model_problems(str(tmp_path / "model.safetensors"))
    assert f"model.safetensors is of {title}" in problem
    assert problem.endswith("and is not read: name its diffusers folder or its hub id")


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    content = {**load_file(file), **{name.replace("__", "."): part for name, part in tensors.items()}}
    save_file({name: part for name, part in content.items() if part is not None}, file)


def as_float8(file: Path) -> None:
    save_file({name: part.to(torch.float8_e4m3fn) for name, part in load_file(file).items()}, file)


FIRST = "model__diffusion_model__input_blocks__0__0__weight"
DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda file: file.write_bytes(file.read_bytes()[:-40]), "is damaged or no safetensors file"),
    (lambda file: change(file, **{FIRST: torch.zeros(16, 9, 3, 3)}), "its U-Net reads 9 channels, as for inpainting"),
    (lambda file: save_file({"lora_unet_mid.lora_up.weight": torch.zeros(1)}, file), "is a LoRA: name the checkpoint"),
    (
        lambda file: save_file({"weight": torch.zeros(1)}, file),
        "is no checkpoint of Stable Diffusion 1.x, 2.x, XL, 3 or",
    ),
    (as_float8, "must hold weights of 16 or 32 bits, got F8_E4M3: name the full checkpoint"),
    (lambda file: change(file, v_pred=torch.zeros(0)), "predicts velocity, and the scheduler of single_file_config"),
    (lambda file: change(file, ztsnr=torch.zeros(0)), "has no signal at its last timestep (ztsnr), and the scheduler"),
    (
        lambda file: change(file, conditioner__embedders__0__model__text_projection=torch.zeros(1)),
        "is a refiner, which continues images of another model: name the base model",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_a_single_file_that_cannot_be_trained_is_refused_by_its_header(
    damage: Callable[[Path], object], message: str, tmp_path: Path, tiny_model: Path
) -> None:
    file = save_file_of(tiny_model, tmp_path / "model.safetensors")
    damage(file)
    (problem,) = model_problems(ModelSource(str(file), single_file_config=str(tiny_model)))
    assert message in problem
    assert "\n" not in problem


def test_a_file_of_2_needs_its_configs(tmp_path: Path, tiny_model: Path) -> None:
    """Those of 512 px predict noise, those of 768 px velocity, and the tensors are the same."""
    file = save_file_of(tiny_model, tmp_path / "model.safetensors")
    change(file, cond_stage_model__model__token_embedding__weight=torch.zeros(1))
    (problem,) = model_problems(ModelSource(str(file)))
    assert (
        "does not say whether it predicts noise, as those of 512 px do, or velocity, as those of 768 px: name a folder"
        in problem
    )


def test_a_scheduler_that_agrees_with_the_marks_of_a_file_is_taken(tmp_path: Path, tiny_model: Path) -> None:
    file = save_file_of(tiny_model, tmp_path / "model.safetensors")
    change(file, v_pred=torch.zeros(0), ztsnr=torch.zeros(0))
    configs = shutil.copytree(tiny_model, tmp_path / "configs")
    scheduler = configs / "scheduler" / "scheduler_config.json"
    source = ModelSource(str(file), single_file_config=str(configs))
    assert len(model_problems(source)) == 2
    marks = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | marks))
    assert model_problems(source) == []


def test_a_pickle_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"\x80\x04")
    (problem,) = model_problems(str(file))
    assert "model.ckpt is no .safetensors file, and others, which may be pickles, are never read: name such" in problem


def test_configs_of_another_family_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    file = save_file_of(tiny_model, tmp_path / "model.safetensors")
    other = tiny_xl_pipeline(tmp_path / "other")
    (problem,) = model_problems(ModelSource(str(file), single_file_config=str(other)))
    assert "is of a StableDiffusionXLPipeline, and" in problem
    assert problem.endswith("of a Stable Diffusion 1.x: name the configs of a Stable Diffusion 1.x")


def test_configs_that_are_nowhere_are_missed_in_one_line(
    tmp_path: Path, tiny_model: Path, hub: Callable[..., None]
) -> None:
    file = save_file_of(tiny_model, tmp_path / "model.safetensors")
    (problem,) = model_problems(ModelSource(str(file)))
    assert "has no configs of its own, and stable-diffusion-v1-5/stable-diffusion-v1-5 is not in the cache" in problem
    assert problem.endswith("or name a folder with them by --single_file_config")
    hub(tiny_model, "stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert model_problems(ModelSource(str(file))) == []


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what puts a model into an empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources.fetch_configs.cache_clear()

    def put(model: Path, name: str, revision: str = "main") -> None:
        folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        commit = f"{len(list(folder.glob('snapshots/*'))):040x}"
        shutil.copytree(model, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)

    return put


def test_a_hub_id_is_read_from_the_cache_at_its_revision(
    hub: Callable[..., None], tmp_path: Path, tiny_images: Path
) -> None:
    first, second = tiny_pipeline(tmp_path / "first"), tiny_pipeline(tmp_path / "second", seed=1)
    hub(first, "owner/name")
    hub(second, "owner/name", "v2")
    digests = [load_backbone(folder, device="cpu").digest for folder in (first, second)]
    assert load_backbone("owner/name", device="cpu").digest == digests[0]
    assert load_backbone(ModelSource("owner/name", revision="v2"), device="cpu").digest == digests[1]
    config = config_of(tiny_images, tmp_path / "run", pretrained_model_name_or_path="owner/name", revision="v2")
    run = personalise(config).folder
    assert json.loads((run / "result.json").read_text())["base_sha256"] == digests[1]
    assert 'DiffusionPipeline.from_pretrained("owner/name", revision="v2")' in (run / "README.md").read_text()


def test_code_for_a_hub_id_loads_it_without_the_encoders_that_it_lacks_in_the_cache(
    hub: Callable[..., None], tmp_path: Path
) -> None:
    hub(tiny_sd3_pipeline(tmp_path / "model"), "owner/name")
    absent = "text_encoder_3=None, tokenizer_3=None"
    for name, arguments in {"owner/name": f'"owner/name", {absent}', "owner/other": '"owner/other"'}.items():
        config = config_of(tmp_path, tmp_path / "run", pretrained_model_name_or_path=name)
        assert load_pipeline_code(config, public=True) == f"DiffusionPipeline.from_pretrained({arguments})"


def test_without_a_network_one_line_says_so(hub: Callable[..., None], tmp_path: Path, tiny_images: Path) -> None:
    config = config_of(tiny_images, tmp_path / "run", pretrained_model_name_or_path="owner/name", revision="v2")
    with pytest.raises(RefusedInput) as caught:
        personalise(config)
    assert caught.value.problems == (
        "owner/name at revision v2 is not in the cache and there is no network: connect once, or name a folder",
    )
    with pytest.raises(ModelError, match="owner/name is not in the cache and there is no network"):
        load_backbone("owner/name", device="cpu")


def test_a_connection_that_breaks_is_another_error_than_a_model_that_does_not_load(
    hub: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection reset by peer")

    hub(tiny_pipeline(tmp_path / "model"), "owner/name")
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", break_down)
    with pytest.raises(UnreachableModel, match=r"owner/name cannot be fetched whole \(Connection reset by peer\): try"):
        load_backbone("owner/name", device="cpu")
    assert isinstance(UnreachableModel(), PASSING), "a batch tries it again"


def test_a_model_on_the_hub_is_checked_by_its_configs_before_weights_are_fetched(
    hub: Callable[..., None], tmp_path: Path
) -> None:
    folder = strip_weights(tiny_pipeline(tmp_path / "model"), "unet", "vae", "text_encoder")
    index = folder / "unet" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"in_channels": 9}))
    hub(folder, "owner/name")
    (problem,) = model_problems("owner/name")
    assert "model owner/name: unet.in_channels must be 4, the sum of vae.latent_channels, got 9" in problem


# --- variants and options -------------------------------------------------------------------------------------------


def test_a_variant_is_loaded_by_its_name_alone(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    digest = load_backbone(folder, device="cpu").digest
    for file in [file for name in WEIGHTS for file in folder.glob(f"*/{name}")]:
        file.rename(file.with_name(f"{file.stem}.fp16.safetensors"))
    (first, *_) = model_problems(str(folder))
    assert "has only weights of a variant, diffusion_pytorch_model.fp16.safetensors: name it, as in --variant" in first
    source = ModelSource(str(folder), variant="fp16")
    assert model_problems(source) == []
    assert load_backbone(source, device="cpu").digest == digest
    (first, *_) = model_problems(ModelSource(str(folder), variant="bf16"))
    assert "has no weights of variant bf16, only diffusion_pytorch_model.fp16.safetensors: drop the variant" in first


def test_options_of_another_kind_of_place_are_refused(tiny_model: Path) -> None:
    for option, kind in (("revision", "a folder"), ("single_file_config", "a folder")):
        (problem,) = model_problems(ModelSource(str(tiny_model), **{option: "v2"}))
        assert problem == f"{option} is not for {kind}, got 'v2' with {tiny_model}: drop it"


@pytest.mark.parametrize(("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_weights_of_8_bits_in_a_folder_are_refused(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {key: part.to(dtype) for key, part in load_file(file).items()}
    save_file(weights, file.with_name("diffusion_pytorch_model.fp8.safetensors"))
    assert model_problems(str(folder)) == []  # for the variant is not read
    save_file(weights, file)
    (problem,) = model_problems(str(folder))
    start = f"model folder {folder}: unet/diffusion_pytorch_model.safetensors must hold weights of 16 or 32 bits"
    assert problem == f"{start}, got {name}: name the full model; --quantize makes it smaller"


def test_positions_that_are_whole_numbers_are_no_weights_of_few_bits(tmp_path: Path) -> None:
    """The text encoders of older folders and files of Stable Diffusion 1.x hold them."""
    folder = tiny_pipeline(tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(file) | positions, file)
    assert model_problems(str(folder)) == []
    single = tmp_path / "model.safetensors"
    save_file_of(folder, single)
    source = ModelSource(str(single), single_file_config=str(folder))
    save_file(
        load_file(single) | {f"cond_stage_model.transformer.{key}": ids for key, ids in positions.items()}, single
    )
    assert model_problems(source) == []


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "model")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"load_in_4bit": True}}))
    (problem,) = model_problems(str(folder))
    assert "unet is quantised already, and cannot be hashed or exported: name the full model" in problem
