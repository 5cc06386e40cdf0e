"""DreamBooth-LoRA: targets, initial values, scaling, metadata."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.diffusion.backbones.stable_diffusion import StableDiffusion
from dvar.training.methods.dreambooth_lora import TEXT_TARGETS, DreamBoothLora
from dvar.training.run_layout import EMBEDS, LORA


@pytest.fixture
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(tiny_model, device="cpu")


def test_every_attention_matrix_has_two_low_rank_factors(backbone: Backbone) -> None:
    attentions = [name for name, part in backbone.denoiser.named_modules() if name.endswith((".attn1", ".attn2"))]
    method = DreamBoothLora(backbone, rank=2)
    expected = {
        f"unet.{name}.{target}.lora_{side}.weight"
        for name in attentions
        for target in StableDiffusion.targets["attention"]
        for side in "AB"
    }
    assert set(method.matrices) == expected
    assert {min(matrix.shape) for matrix in method.matrices.values()} == {2}
    assert {matrix.dtype for matrix in method.matrices.values()} == {torch.float32}
    assert method.token is None
    assert len(method.parameters) == len(expected)


def test_targets_may_exclude_self_attention_or_include_the_gates(tiny_model: Path) -> None:
    adapted = {}
    for choice in StableDiffusion.targets:
        backbone = load_backbone(tiny_model, device="cpu")
        method = DreamBoothLora(backbone, targets=choice)
        adapted[choice] = {name.removeprefix("unet.").rpartition(".lora_")[0] for name in method.matrices}
        adapter = json.loads(method.metadata["lora_adapter_metadata"])
        assert adapter["unet.target_modules"] == sorted(StableDiffusion.targets[choice])
        layers = dict(backbone.denoiser.named_modules())
        assert adapted[choice] == {
            name.removesuffix(".lora_A.default") for name in layers if name.endswith(".lora_A.default")
        }
    assert adapted["cross-attention"] == {name for name in adapted["attention"] if ".attn2." in name} != set()
    gates = adapted["attention+gates"] - adapted["attention"]
    assert adapted["attention"] < adapted["attention+gates"]
    # One beside each block, as the released code takes the linear layer of each GEGLU.
    assert {name.removesuffix(".ff.net.0.proj") for name in gates} == {
        name.partition(".attn")[0] for name in adapted["attention"]
    }


def test_the_first_factor_is_gaussian_with_deviation_one_over_rank_and_the_second_zero(backbone: Backbone) -> None:
    method = DreamBoothLora(backbone, rank=8)
    weights = torch.cat([matrix.detach().flatten() for name, matrix in method.matrices.items() if "lora_A" in name])
    # 1 / 8, and its standard error over n draws is (1 / 8) / sqrt(2 n).
    assert float(weights.std()) == pytest.approx(1 / 8, abs=4 * (1 / 8) / (2 * len(weights)) ** 0.5)
    assert all(not matrix.any() for name, matrix in method.matrices.items() if "lora_B" in name)


def test_the_first_factor_is_as_wide_in_every_layer_and_has_the_tails_of_a_gaussian(backbone: Backbone) -> None:
    """PEFT's default is uniform and narrower the wider the layer; over all layers of this model it is as wide."""
    weights = [matrix for name, matrix in DreamBoothLora(backbone, rank=8).matrices.items() if "lora_A" in name]
    for weight in weights:
        assert float(weight.detach().std()) == pytest.approx(1 / 8, abs=5 * (1 / 8) / (2 * weight.numel()) ** 0.5)
    values = torch.cat([weight.detach().flatten() for weight in weights])
    # 4.55 % of a Gaussian lie beyond two standard deviations, and none of a uniform distribution.
    assert float((values.abs() > 2 / 8).float().mean()) == pytest.approx(0.0455, abs=4 * (0.0434 / len(values)) ** 0.5)


def test_the_draw_is_keyed_by_the_seed_and_preserves_the_global_random_state(tiny_model: Path) -> None:
    states: list[dict[str, Tensor]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(states))
        before = torch.get_rng_state()
        states.append(DreamBoothLora(load_backbone(tiny_model, device="cpu"), seed=seed).state)
        assert torch.equal(torch.get_rng_state(), before)
    first, repeat, reseeded = states
    assert all(torch.equal(first[name], repeat[name]) for name in first)
    assert all(not torch.equal(first[name], reseeded[name]) for name in first if "lora_A" in name)


def test_vectors_are_learned_too_with_a_placeholder_token(backbone: Backbone) -> None:
    method = DreamBoothLora(backbone, "<thing>", "mug", 2)
    assert method.token is not None
    assert method.parameters[0] is method.token.rows
    assert method.expand("a photo of <thing>") == "a photo of <thing> <thing>_1"
    files = method.files(method.state)
    assert files.keys() == {EMBEDS, LORA}
    assert files[EMBEDS].keys() == {"<thing>"}
    assert files[LORA].keys() == method.matrices.keys()


def test_the_learned_state_can_be_saved_and_restored(backbone: Backbone, tiny_model: Path) -> None:
    method = DreamBoothLora(backbone, "<thing>", "mug")
    with torch.no_grad():
        for index, matrix in enumerate(method.matrices.values()):
            matrix.normal_(generator=torch.Generator().manual_seed(index))
    state = method.state
    restored = DreamBoothLora(load_backbone(tiny_model, device="cpu"), "<thing>", "cat", seed=1)
    restored.load(state)
    assert all(torch.equal(restored.state[name], tensor) for name, tensor in state.items())
    with torch.no_grad():
        for matrix in method.matrices.values():
            matrix.zero_()
    assert all(tensor.any() for tensor in state.values()), "a state is a copy"


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (8, 2.0)])
def test_the_change_is_scaled_by_alpha_over_rank(backbone: Backbone, alpha: int | None, factor: float) -> None:
    layer = next(name for name, _ in backbone.denoiser.named_modules() if name.endswith("attn2.to_k"))
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    base = backbone.denoiser.get_submodule(layer)(hidden)
    method = DreamBoothLora(backbone, rank=4, alpha=alpha)
    down, up = (method.matrices[f"unet.{layer}.lora_{side}.weight"] for side in "AB")
    with torch.no_grad():
        up.normal_(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(backbone.denoiser.get_submodule(layer)(hidden), base + factor * hidden @ down.T @ up.T)


def test_the_metadata_states_rank_alpha_and_targets(backbone: Backbone) -> None:
    (metadata,) = DreamBoothLora(backbone, rank=2, alpha=6).metadata.values()
    adapter = json.loads(metadata)
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (2, 6)
    assert adapter["unet.target_modules"] == sorted(StableDiffusion.targets["attention"])


def test_only_the_base_is_in_half_precision(tiny_model: Path) -> None:
    backbone = load_backbone(tiny_model, device="cpu", mixed_precision="bf16")
    method = DreamBoothLora(backbone)
    assert {matrix.dtype for matrix in method.matrices.values()} == {torch.float32}
    learned_ids = {id(matrix) for matrix in method.parameters}
    assert {part.dtype for part in backbone.denoiser.parameters() if id(part) not in learned_ids} == {torch.bfloat16}


def test_the_text_encoder_is_adapted_on_request(backbone: Backbone, tiny_model: Path) -> None:
    ids = backbone.tokenize(["a photo of mug"])
    before = backbone.text_encoder(ids)[0].detach()
    method = DreamBoothLora(backbone, "<thing>", "mug", rank=2, alpha=4, text_encoder=True)
    assert torch.equal(backbone.text_encoder(ids)[0], before)
    text_matrices = {name for name in method.matrices if name.startswith("text_encoder.")}
    assert text_matrices == {
        f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{target}.lora_{side}.weight"
        for layer in range(2)
        for target in TEXT_TARGETS
        for side in "AB"
    }
    plain = DreamBoothLora(load_backbone(tiny_model, device="cpu"), rank=2)
    assert method.matrices.keys() - plain.matrices.keys() == text_matrices
    assert all(torch.equal(method.matrices[name], plain.matrices[name]) for name in plain.matrices)
    learned_ids = {id(weight) for weight in method.parameters}
    weights = [*backbone.text_encoder.named_parameters(), *backbone.denoiser.named_parameters()]
    assert learned_ids == {id(weight) for _, weight in weights if weight.requires_grad}
    adapter = json.loads(*method.metadata.values())
    assert (adapter["text_encoder.r"], adapter["text_encoder.lora_alpha"]) == (2, 4)
    assert adapter["text_encoder.target_modules"] == sorted(TEXT_TARGETS)
    assert (adapter["unet.r"], adapter["unet.lora_alpha"]) == (2, 4)
    with torch.no_grad():
        for name in text_matrices:
            method.matrices[name].normal_(generator=torch.Generator().manual_seed(3))
    assert not torch.isclose(backbone.text_encoder(ids)[0], before).all()
