"""Backbones: loading, encoding, prediction, refused models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from dvar.diffusion.backbone import load_backbone, load_tokenizer
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.diffusion.devices import peak_memory
from dvar.diffusion.families import BACKBONES, BackboneEntry
from dvar.diffusion.objective import Encoded, denoising_loss, draw
from dvar.diffusion.sampling import sample
from dvar.diffusion.source import ModelSource
from dvar.errors import ModelError
from dvar.testing import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_ldm_pipeline,
    tiny_qwen_image_pipeline,
    tiny_sd3_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from dvar.training.methods.dreambooth_lora import DreamBoothLora


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> StableDiffusion:
    return StableDiffusion.load(tiny_model, device="cpu")


def load_images(folder: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB").resize((32, 32)) for path in sorted(folder.glob("*.png"))]


def test_everything_is_frozen_and_in_eval_mode(backbone: StableDiffusion) -> None:
    for network in backbone.modules:
        assert not any(weight.requires_grad for weight in network.parameters())
        assert not any(part.training for part in network.modules())


def test_moments_of_an_image_do_not_depend_on_its_batch(backbone: StableDiffusion, tiny_images: Path) -> None:
    images = load_images(tiny_images)
    moments = backbone.encode(images)
    assert moments.shape == (4, 8, 8, 8)
    assert moments.dtype == torch.float32
    assert torch.equal(backbone.encode(images[2:3]), moments[2:3])
    white = torch.ones(1, 3, 32, 32)
    expected = backbone.vae.encode(white).latent_dist.parameters
    assert torch.equal(backbone.encode([Image.new("L", (32, 32), 255)]), expected)


def test_prompts_are_padded_and_truncated_to_the_length_of_the_text_encoder(backbone: StableDiffusion) -> None:
    ids = backbone.tokenize(["a mug", "mug " * 200])
    assert ids.shape == (2, 77)
    assert ids[0, 0] == backbone.tokenizer.bos_token_id
    assert ids[1, -1] == backbone.tokenizer.eos_token_id


def test_prediction_is_that_of_the_stock_pipelines_networks(backbone: StableDiffusion, tiny_model: Path) -> None:
    stock = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    noisy, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    ids = backbone.tokenize(["a photo of mug", "a dark cat"])
    with torch.no_grad():
        expected = stock.unet(noisy, timesteps, encoder_hidden_states=stock.text_encoder(ids)[0]).sample
        assert torch.equal(backbone.predict(noisy, timesteps, ids), expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_still_gives_float32_losses_and_gradients(
    backbone: StableDiffusion, tiny_model: Path, tiny_images: Path, precision: str
) -> None:
    half = StableDiffusion.load(tiny_model, device="cpu", mixed_precision=precision)
    assert half.unet.dtype != torch.float32
    examples = Encoded(half.encode(load_images(tiny_images)).unsqueeze(1), [half.tokenize(["a mug"])] * 4)
    draws = draw(examples, timesteps=1000, seed=0, stream="train", first=0, count=4)
    losses = denoising_loss(half.predict, draws, half.schedule)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, denoising_loss(backbone.predict, draws, backbone.schedule), rtol=5e-3, atol=0)
    assert not torch.equal(losses, denoising_loss(backbone.predict, draws, backbone.schedule))


@pytest.mark.slow
@pytest.mark.parametrize(
    "save",
    [
        tiny_ldm_pipeline,
        tiny_xl_pipeline,
        tiny_sd3_pipeline,
        tiny_flux_pipeline,
        tiny_klein_pipeline,
        tiny_z_image_pipeline,
        tiny_qwen_image_pipeline,
    ],
)
def test_every_family_computes_its_loss_and_generates_in_half_precision(
    save: Callable[[Path], Path], tiny_images: Path, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model")
    losses = []
    for options in ({}, {"mixed_precision": "bf16", "gradient_checkpointing": True}):
        model = load_backbone(folder, device="cpu", **options)  # type: ignore[arg-type]
        examples = Encoded(model.encode(load_images(tiny_images)).unsqueeze(1), [model.tokenize(["a mug"])] * 4)
        draws = draw(examples, timesteps=1000, seed=0, stream="train", first=0, count=2)
        method = DreamBoothLora(model)
        losses.append(denoising_loss(model.predict, draws, model.schedule))
    assert losses[1].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0)
    assert not torch.equal(losses[1], losses[0])
    torch.autograd.backward(losses[1].mean())
    assert any(matrix.grad is not None and matrix.grad.any() for matrix in method.parameters)
    (image,) = sample(model, ["a mug"], [0], size=32, steps=2, guidance=4.0)
    assert image.size == (32, 32)


def test_gradient_checkpointing_gives_the_same_gradient(tiny_model: Path) -> None:
    gradients = []
    for recompute in (False, True):
        model = StableDiffusion.load(tiny_model, device="cpu", gradient_checkpointing=recompute)
        assert model.unet.is_gradient_checkpointing == recompute
        embeddings = model.text_encoder.get_input_embeddings().weight.requires_grad_()
        noisy = torch.ones(1, 4, 8, 8)
        torch.autograd.backward(model.predict(noisy, torch.tensor([500]), model.tokenize(["a mug"])).square().sum())
        gradients.append(embeddings.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_what_is_compiled_has_the_adapters_in_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters: list[int] = []

    def compile_lazily(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            adapters.append(sum("lora_A" in name for name, _ in model.denoiser.named_modules()))
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(torch, "compile", compile_lazily)
    model = load_backbone(tiny_model, device="cpu", compile=True)
    assert not adapters, "nothing is traced while the model loads"
    DreamBoothLora(model)
    model.predict(torch.randn(1, 4, 8, 8), torch.tensor([10]), model.tokenize(["a mug"]))
    assert len(adapters) == 1
    assert adapters[0] > 0


def test_attention_is_sliced_only_on_request_and_predicts_the_same(tiny_model: Path) -> None:
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([500, 20])
    predictions, kinds = [], []
    for sliced in (False, True):
        backbone = StableDiffusion.load(tiny_model, device="cpu", attention_slicing=sliced)
        kinds.append({type(processor).__name__ for processor in backbone.denoiser.attn_processors.values()})
        with torch.no_grad():
            predictions.append(backbone.predict(*inputs, backbone.tokenize(["a mug", "a dark cat"])))
    assert kinds == [{"AttnProcessor2_0"}, {"SlicedAttnProcessor"}]
    torch.testing.assert_close(*predictions)


def test_a_folder_without_a_model_is_refused_in_one_line(tmp_path: Path, tiny_model: Path) -> None:
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(ModelError, match=f"{tmp_path} does not load") as error:
            load(tmp_path)
        assert "\n" not in str(error.value)


def test_another_kind_of_pipeline_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "xl")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionUpscalePipeline"}))
    with pytest.raises(ModelError, match="xl is a StableDiffusionUpscalePipeline, which starts from an image: choose"):
        load_backbone(folder)


def test_a_model_that_predicts_samples_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "sample")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ModelError, match="predicts sample"):
        StableDiffusion.load(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_weight_that_is_not_finite_is_refused_by_name(tmp_path: Path, tiny_model: Path, part: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (path,) = (folder / part).glob("*.safetensors")
    weights = load_file(path)
    name = sorted(weights)[-1]
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=f"model holds weights that are not finite, .*{name} among them: copy"
    ) as error:
        load_backbone(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_latents_without_a_scale_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0}))
    with pytest.raises(ModelError, match=r"scaled by a number above 0, .*model scales them by 0.0: copy"):
        load_backbone(folder, device="cpu")


def test_loading_prints_nothing(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    StableDiffusion.load(tiny_model, device="cpu", mixed_precision="bf16")
    assert capfd.readouterr() == ("", "")


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_memory(torch.device("cpu"))
    assert peak is None or peak > 50 * 2**20


def test_a_backbone_of_another_package_is_loaded_by_the_class_of_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    calls: list[Any] = []

    def load(source: ModelSource, **options: Any) -> Any:
        calls.append((source.name, options["device"]))
        return "a model"

    entry = BackboneEntry("OtherPipeline", "Other model", load, lambda name: "a tokenizer", ())
    monkeypatch.setattr(BACKBONES, "_items", {**BACKBONES, entry.pipeline: entry})
    model: Any = load_backbone(tmp_path, device="cpu")
    assert model == "a model"
    assert load_tokenizer(tmp_path) == "a tokenizer"
    assert calls == [(str(tmp_path), "cpu")]
