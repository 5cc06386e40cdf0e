"""Memory: quantised bases, weights that are loaded as they are stored, and parts that wait on the CPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvar.cli.main import main
from dvar.config.methods import CustomDiffusionConfig, DreamBoothLoraConfig
from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.backbones.stock import StockBackbone
from dvar.diffusion.loading import loading_errors, stored_dtypes
from dvar.diffusion.sampling import rehearse
from dvar.errors import RefusedInput
from dvar.runs.export import write_merged_pipeline
from dvar.runs.load_model import load_personalised_backbone, loading_options
from dvar.testing import (
    tiny_flux_pipeline,
    tiny_klein_pipeline,
    tiny_pipeline,
    tiny_xl_pipeline,
    tiny_z_image_pipeline,
)
from dvar.training.methods.dreambooth_lora import DreamBoothLora
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.personalise import personalise

KINDS = ("nf4", "int8")
WEIGHTS = "diffusion_pytorch_model.safetensors"
Save = Callable[..., Path]


def inputs(backbone: Any, resolution: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return noisy, backbone.schedule.times[[500]], backbone.tokenize(["a photo of mug"])


# --- quantised bases ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [tiny_pipeline, tiny_flux_pipeline])
def test_a_quantised_base_predicts_nearly_the_same_in_a_part_of_the_memory(
    save: Save, kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    folder = save(tmp_path / "model")
    whole, small = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu", quantize=kind)
    assert small.digest == whole.digest
    layers = {type(layer).__name__ for layer in small.denoiser.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind] in layers
    blocks = [part for name, part in small.denoiser.named_modules() if ".0." in name and type(part) is nn.Linear]
    assert blocks == []
    with torch.no_grad():
        exact, rounded = whole.predict(*inputs(whole)), small.predict(*inputs(small))
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < {"nf4": 0.3, "int8": 0.05}[kind]


def test_what_stands_before_and_after_the_blocks_is_not_quantised(tmp_path: Path) -> None:
    """Of a Z-Image it has numbers in its names, too: its embedders of time and captions are sequences of layers."""
    pytest.importorskip("bitsandbytes")
    backbone = load_backbone(tiny_z_image_pipeline(tmp_path / "model"), device="cpu", quantize="nf4")
    small = {name for name, layer in backbone.denoiser.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert {name.split(".")[0] for name in small} == {"layers", "noise_refiner", "context_refiner"}


def test_layers_of_8_bits_follow_their_weights_to_other_memory(tmp_path: Path) -> None:
    """As when --offload moves the whole network to a GPU, before its first evaluation and after."""
    pytest.importorskip("bitsandbytes")
    backbone = load_backbone(tiny_pipeline(tmp_path / "model"), device="cpu", quantize="int8")
    layers = [layer for layer in backbone.denoiser.modules() if type(layer).__name__ == "Linear8bitLt"]
    expected = None
    for _ in range(2):
        for layer in layers:
            layer.weight.data = layer.weight.data.clone()
            for holder in (layer.weight, layer.state):
                if holder.CB is not None:
                    holder.CB.zero_()  # what is left behind
        with torch.no_grad():
            predicted = backbone.predict(*inputs(backbone))
        assert predicted.std() > 0.01
        assert expected is None or torch.equal(predicted, expected)
        expected = predicted
    assert all(layer.state.CB.data_ptr() == layer.weight.data_ptr() for layer in layers)


def test_memory_that_runs_out_while_loading_is_no_broken_model() -> None:
    with pytest.raises(torch.OutOfMemoryError), loading_errors("model", "Stable Diffusion model"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_t5_computes_in_float32_beside_a_network_in_half_precision(tmp_path: Path) -> None:
    backbone: Any = load_backbone(tiny_flux_pipeline(tmp_path / "model"), device="cpu", mixed_precision="fp16")
    encoder, dtypes = backbone.stock.text_encoder_2, set()
    for name, layer in encoder.named_modules():
        if name.endswith("wo"):
            layer.weight.data *= 3e5  # whose products are beyond the range of float16
            layer.register_forward_hook(lambda _layer, _inputs, output: dtypes.add(output.dtype))
    with torch.no_grad(), backbone.autocast():
        states = backbone.encode_captions(backbone.tokenize(["a photo of mug"]))
        assert torch.is_autocast_enabled("cpu"), "the scope is as before"
    assert dtypes == {torch.float32}
    assert all(bool(state.isfinite().all()) for state in states["text_encoder_2"])
    assert copy.deepcopy(encoder)(torch.ones(1, 4, dtype=torch.int64))[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dora", [False, True])
def test_lora_and_a_word_have_gradients_through_a_quantised_base(kind: str, dora: bool, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    backbone = load_backbone(tiny_model, device="cpu", quantize=kind)
    method = DreamBoothLora(backbone, "<thing>", "mug", dora=dora)
    frozen = [part.clone() for name, part in backbone.denoiser.named_parameters() if not part.requires_grad]
    noisy, times, _ = inputs(backbone)
    loss = backbone.predict(noisy, times, backbone.tokenize(["a photo of <thing>"])).square().mean()
    gradients = torch.autograd.grad(loss, method.parameters, allow_unused=True)
    assert gradients[0] is not None
    assert bool(gradients[0].any())  # of the word, whose gradient passes through the frozen layers
    assert sum(bool(part.any()) for part in gradients[1:] if part is not None) >= len(method.matrices) // 2
    now = [part for name, part in backbone.denoiser.named_parameters() if not part.requires_grad]
    assert all(torch.equal(part, before) for part, before in zip(now, frozen, strict=True))


def nine_steps(model: Path, images: Path, output: Path, **changes: Any) -> DreamBoothLoraConfig:
    return DreamBoothLoraConfig(
        pretrained_model_name_or_path=str(model),
        instance_data_dir=str(images),
        instance_prompt="a photo of mug",
        resolution=32,
        max_train_steps=9,
        window=8,
        threshold=1e-9,
        num_inference_steps=2,
        num_validation_images=1,
        output_dir=str(output),
        **changes,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_quantised_base_learns_and_its_lora_fits_the_whole_one(
    kind: str, tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    config = nine_steps(tiny_model, tiny_images, tmp_path / "run", learning_rate=1e-2, quantize=kind)
    run = personalise(config).folder
    learned = load_file(run / "pytorch_lora_weights.safetensors")
    assert any(bool(part.any()) for name, part in learned.items() if "lora_B" in name)
    backbone, base = load_personalised_backbone(run, device="cpu"), load_backbone(tiny_model, device="cpu")
    with torch.no_grad():
        change = (backbone.predict(*inputs(backbone)) - base.predict(*inputs(base))).abs().max()
    assert change > 1e-4


def pixels(path: Path) -> Any:
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("no", marks=pytest.mark.slow)])
def test_a_run_generates_in_its_own_precision_and_bits_or_in_others(
    precision: str, tiny_model: Path, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    changes: dict[str, Any] = {"quantize": "nf4", "mixed_precision": precision}
    config = nine_steps(tiny_model, tiny_images, tmp_path / "run", **changes)
    run = personalise(config).folder
    sample = pixels(run / "samples" / "step-000009" / "00.png")
    command = ["generate", str(run), "--prompt", "a photo of mug", "--num_images", "1"]
    images = []
    for flags in ([], ["--quantize", "no", "--mixed_precision", "no", "--no_offload"], ["--offload"]):
        capsys.readouterr()
        assert main([*command, *flags]) == 0
        images.append(pixels(Path(capsys.readouterr().out.strip())))
    assert np.array_equal(images[0], sample)
    assert np.array_equal(images[2], sample)
    assert not np.array_equal(images[1], sample)
    own = load_personalised_backbone(run, device="cpu", **loading_options(config))
    assert "Linear4bit" in {type(layer).__name__ for layer in own.denoiser.modules()}
    assert next(part.dtype for name, part in own.denoiser.named_parameters() if name.startswith("conv_in")) == (
        torch.bfloat16 if precision == "bf16" else torch.float32
    )
    merged = {
        kind: load_file(write_merged_pipeline(run, tmp_path / str(kind), kind) / "unet" / WEIGHTS)
        for kind in (None, "no")
    }
    dtypes = {kind: {part.dtype for part in tensors.values()} for kind, tensors in merged.items()}
    assert dtypes == {None: {torch.bfloat16 if precision == "bf16" else torch.float32}, "no": {torch.float32}}


def test_weights_of_custom_diffusion_are_not_quantised_to_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedInput, match="quantize freezes the weights that custom-diffusion trains, got nf4: drop"):
        loading_options(CustomDiffusionConfig(class_noun="mug"), quantize="nf4")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RefusedInput, match="quantize int8 needs the package bitsandbytes, which is not installed"):
        loading_options(DreamBoothLoraConfig(quantize="int8"))
    assert loading_options(DreamBoothLoraConfig(quantize="int8", offload=True), "bf16", "no") == {
        "mixed_precision": "bf16",
        "quantize": "no",
        "offload": True,
    }


def test_what_custom_diffusion_trains_cannot_be_quantised(tiny_images: Path, tmp_path: Path) -> None:
    from dvar.training.preflight import preflight

    config = CustomDiffusionConfig(instance_data_dir=str(tiny_images), class_noun="mug", quantize="nf4", resolution=32)
    with pytest.raises(RefusedInput, match="quantize freezes the weights that custom-diffusion trains, got nf4: drop"):
        preflight(config, None)


# --- weights as they are stored -------------------------------------------------------------------------------------


def store_as(folder: Path, dtype: torch.dtype) -> None:
    for file in folder.rglob("*.safetensors"):
        tensors = {name: part.to(dtype) if part.is_floating_point() else part for name, part in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("save", [tiny_xl_pipeline, tiny_klein_pipeline])
def test_half_precision_is_loaded_as_it_is_stored_and_has_the_digest_of_float32(save: Save, tmp_path: Path) -> None:
    folder = save(tmp_path / "model")
    denoiser = json.loads((folder / "model_index.json").read_text())
    name = "unet" if "unet" in denoiser else "transformer"
    assert stored_dtypes(folder, [name, "text_encoder"]) == {}
    store_as(folder, torch.bfloat16)
    assert stored_dtypes(folder, [name, "text_encoder"]) == {name: torch.bfloat16, "text_encoder": torch.bfloat16}
    whole, half = (load_backbone(folder, device="cpu", mixed_precision=precision) for precision in ("no", "bf16"))
    assert half.digest == whole.digest
    assert {part.dtype for part in half.denoiser.parameters()} == {torch.bfloat16}
    language = half.towers[0].embeds_key is None
    assert {part.dtype for part in half.text_encoder.parameters()} == {torch.bfloat16 if language else torch.float32}
    assert {part.dtype for network in whole.modules for part in network.parameters()} == {torch.float32}


# --- parts that are idle --------------------------------------------------------------------------------------------


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, str]]:
    """Record where networks are sent, and leave them where they are: there is one device here."""
    calls: list[tuple[nn.Module, str]] = []
    original = nn.Module.to

    def to(network: nn.Module, *arguments: Any, **options: Any) -> Any:
        if arguments and isinstance(arguments[0], str | torch.device):
            calls.append((network, str(arguments[0])))
            return network if str(arguments[0]) != "meta" else original(network, "meta")
        return original(network, *arguments, **options)

    monkeypatch.setattr(nn.Module, "to", to)
    return calls


def test_with_offload_one_network_at_a_time_is_on_the_device_until_training(
    moves: list[tuple[nn.Module, str]], tmp_path: Path
) -> None:
    folder = tiny_flux_pipeline(tmp_path / "model")
    backbone: Any = load_backbone(folder, device="cpu", offload=True)
    assert isinstance(backbone, StockBackbone)
    DreamBoothLora(backbone)
    from dataclasses import replace

    from PIL import Image

    backbone = replace(backbone, workplace=torch.device("cpu", 0))  # a name of its own, to be told from the home
    moves.clear()
    backbone.encode([Image.new("RGB", (32, 32))])
    backbone.prepare_training(backbone.tokenize(["a photo of mug"]))
    parts = {backbone.vae: "vae", backbone.denoiser: "denoiser"}
    parts |= {tower.encoder: tower.name for tower in backbone.towers}
    log = [(parts[network], place) for network, place in moves if network in parts]
    pairs = [(name, place) for name in ("vae", "text_encoder", "text_encoder_2") for place in ("cpu:0", "cpu")]
    assert log == [*pairs, ("denoiser", "cpu:0")]


def test_what_stays_idle_is_given_up_and_a_missing_prompt_is_not_made_up(tmp_path: Path) -> None:
    backbone: Any = load_backbone(tiny_xl_pipeline(tmp_path / "model"), device="cpu")
    ids = backbone.tokenize(["a photo of mug", "a mug"])
    backbone.prepare_training(ids[:1])
    backbone.release_encoders(lambda: rehearse(backbone, ["a mug"], size=32, guidance=1.0), images=False)
    assert list(backbone.vae.encoder.parameters())
    noisy, times, _ = inputs(backbone)
    backbone.predict(noisy, times, ids[:1])
    with pytest.raises((NotImplementedError, RuntimeError)):
        backbone.predict(noisy, times, ids[1:])


def test_an_encoder_that_trains_stays_and_the_others_go(tmp_path: Path) -> None:
    backbone: Any = load_backbone(tiny_flux_pipeline(tmp_path / "model"), device="cpu")
    TextualInversion(backbone, "<thing>", "mug")
    ids = backbone.tokenize(["a photo of <thing>"])
    backbone.prepare_training(ids)
    backbone.release_encoders(lambda: rehearse(backbone, ["a <thing>"], size=32, guidance=1.0), images=True)
    clip, t5 = backbone.towers
    assert not next(clip.encoder.parameters()).is_meta
    assert next(t5.encoder.parameters()).is_meta
    assert backbone.predict(*inputs(backbone)[:2], ids).requires_grad
