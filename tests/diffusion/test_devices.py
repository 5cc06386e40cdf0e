"""Devices: the arithmetic on them, copies from them, and paths that no CPU value may be on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvar.diffusion.backbone import load_backbone
from dvar.diffusion.devices import (
    best_device,
    copy_to_cpu,
    describe_arithmetic,
    float32_arithmetic,
    peak_memory,
)
from dvar.diffusion.objective import Draws, Encoded, denoising_loss, draw
from dvar.testing import tiny_concept, tiny_pipeline, tiny_sd3_pipeline, tiny_xl_pipeline

FLAGS = (torch.backends.cudnn, torch.backends.cuda.matmul)


@pytest.mark.parametrize(
    ("gpu", "use_cpu", "device"), [(1, "", "cuda:2"), (1, "true", "cpu"), (1, "false", "cuda:2"), (0, "", "cpu")]
)
def test_the_best_device_is_a_gpu_unless_accelerate_launches_on_the_cpu(
    gpu: int, use_cpu: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpu))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setenv("ACCELERATE_USE_CPU", use_cpu)
    assert best_device() == device


@pytest.mark.parametrize("allow", [False, True])
def test_tensor_float_is_set_in_a_scope_and_restored_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, allow: bool
) -> None:
    before = [flags.allow_tf32 for flags in FLAGS]
    inside: list[bool] = []

    def fail() -> None:
        with float32_arithmetic(allow):
            inside.extend(flags.allow_tf32 for flags in FLAGS)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [allow, allow]
    assert [flags.allow_tf32 for flags in FLAGS] == before


def test_the_arithmetic_of_a_run_is_described() -> None:
    facts = describe_arithmetic(torch.device("cpu"), "bf16")
    assert facts == {"device": "cpu", "threads": torch.get_num_threads(), "mixed_precision": "bf16", "tf32": False}


def test_copies_share_no_memory_and_have_no_graph() -> None:
    weights = {"a": torch.nn.Parameter(torch.randn(3, 2)), "b": torch.randn(4, 6).T}
    copies = copy_to_cpu(weights)
    for name, weight in weights.items():
        assert torch.equal(copies[name], weight)
        assert not copies[name].requires_grad
        weight.detach().zero_()
        assert copies[name].any()


def test_the_memory_of_another_device_is_not_asked_for() -> None:
    assert peak_memory(torch.device("meta")) == peak_memory(torch.device("cpu"))


@pytest.mark.parametrize("save", [tiny_pipeline, tiny_xl_pipeline, tiny_sd3_pipeline])
def test_no_value_is_left_on_the_cpu(save: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device computes shapes alone, and refuses tensors of another device, as a GPU does."""
    backbone = load_backbone(save(tmp_path / "model"), device="cpu")  # type: ignore[operator]
    examples = Encoded(_moments(backbone, tmp_path), [backbone.tokenize(["a mug"])] * 4)
    draws = draw(examples, timesteps=1000, seed=0, stream="train", first=0, count=2)
    for network in backbone.modules:
        network.to("meta").requires_grad_()  # what an encoder that does not train has read is kept by its values
    backbone = replace(backbone, workplace=torch.device("meta"))  # type: ignore[type-var]
    losses = denoising_loss(backbone.predict, draws.to(backbone.device), backbone.schedule)
    assert (losses.device.type, losses.shape, losses.dtype) == ("meta", (2,), torch.float32)
    mixed = replace(draws.to(backbone.device), noise=draws.noise)
    with pytest.raises(RuntimeError, match="device"):
        denoising_loss(backbone.predict, mixed, backbone.schedule)


def _moments(backbone: object, folder: Path) -> Tensor:
    from PIL import Image

    images = [
        Image.open(path).convert("RGB").resize((32, 32)) for path in sorted(tiny_concept(folder / "c").glob("*.png"))
    ]
    moments: Tensor = backbone.encode(images).unsqueeze(1)  # type: ignore[attr-defined]
    return moments


def test_draws_move_as_a_whole() -> None:
    names = {name for name, value in vars(_draws().to(torch.device("meta"))).items() if _is_elsewhere(value)}
    assert not names


def _draws() -> Draws:
    examples = Encoded(torch.randn(4, 1, 8, 4, 4), [torch.zeros(1, 7, dtype=torch.int64)] * 4)
    return draw(examples, timesteps=1000, seed=0, stream="train", first=0, count=2)


def _is_elsewhere(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type != "meta"
