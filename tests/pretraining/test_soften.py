"""The logits of attention: read as the model uses them, bounded head by head, and found where they are hard."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from dvar import mini
from pretraining import evaluate
from pretraining.attention import BOUND, bound_heads, hardness, peaks, watched
from pretraining.soften import soften
from pretraining.unet import Held, held_draws

SELF, CROSS = (f"down_blocks.1.attentions.0.transformer_blocks.0.attn{i}" for i in (1, 2))


def network(hardened: float = 1.0) -> UNet2DConditionModel:
    """A small U-Net; the first head of every module has its queries multiplied by ``hardened``."""
    torch.manual_seed(3)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    for module in modules(unet).values():
        module.to_q.weight.data.unflatten(0, (module.heads, -1))[0] *= hardened
    return unet.eval()


def modules(unet: UNet2DConditionModel) -> dict[str, Attention]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, Attention)}


def draws(count: int = 6) -> Held:
    generator = torch.Generator().manual_seed(5)
    noisy, noise = torch.randn(2, count, 4, 8, 8, generator=generator)
    condition = torch.randn(count, 7, 16, generator=generator)
    return Held(noisy, noise, torch.arange(count) * 100, [""] * count, condition)


def read_peaks(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    by_module: dict[str, torch.Tensor] = {}
    with watched(unet, lambda name, module, logits: by_module.update({name: peaks(logits)})):
        draws().predict(unet)
    return by_module


def shares(unet: UNet2DConditionModel) -> dict[str, float]:
    return hardness(unet, lambda: draws().predict(unet))


def test_the_logits_are_those_whose_softmax_the_model_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    unet, watched_weights, used = network(), [], []
    unet.set_attn_processor(AttnProcessor())
    own = Attention.get_attention_scores

    def scores(self: Attention, *inputs: torch.Tensor) -> torch.Tensor:
        weights: torch.Tensor = own(self, *inputs)
        used.append(weights)
        return weights

    monkeypatch.setattr(Attention, "get_attention_scores", scores)
    with watched(unet, lambda name, module, logits: watched_weights.append(logits.softmax(-1).flatten(0, 1))):
        draws().predict(unet)
    assert len(used) == len(modules(unet)) == 8
    for seen, weights in zip(watched_weights, used, strict=True):
        torch.testing.assert_close(seen, weights)


def test_watching_ends_and_changes_nothing() -> None:
    unet = network()
    before = draws().predict(unet)
    assert shares(unet).keys() == modules(unet).keys()
    assert not any(module._forward_pre_hooks for module in modules(unet).values())
    assert torch.equal(draws().predict(unet), before)


@settings(max_examples=8)
@given(hardened=st.floats(30, 3000), bound=st.floats(0.5, 6))
def test_no_head_rises_above_the_bound_and_none_stays_hard(hardened: float, bound: float) -> None:
    unet = network(hardened)
    soften(unet, draws(), bound)
    assert max(float(peak.max()) for peak in read_peaks(unet).values()) <= bound * (1 + 1e-4)
    # One key of n cannot have 0.999 of the weight when it rises at most 6 above the mean of its row.
    assert max(shares(unet).values()) == 0


def test_hard_attention_falls_below_the_bar() -> None:
    unet = network(3000.0)
    assert max(shares(unet).values()) > evaluate.MOST_HARD / 100
    soften(unet, draws(), 6.0)
    assert max(shares(unet).values()) <= evaluate.MOST_HARD / 100


def test_heads_below_the_bound_keep_their_bits() -> None:
    unet, untouched = network(3000.0), network(3000.0)
    below = {name: peak <= BOUND / 2 for name, peak in read_peaks(unet).items()}
    assert soften(unet, draws()) == sum(int((~each).sum()) for each in below.values()) > 0
    for name, module in modules(unet).items():
        for part in ("to_q", "to_k"):
            now, before = (
                getattr(each, part).weight.unflatten(0, (module.heads, -1))
                for each in (module, modules(untouched)[name])
            )
            assert torch.equal(now[below[name]], before[below[name]])
            assert not torch.equal(now[~below[name]], before[~below[name]])
    others = {key for key in unet.state_dict() if not key.endswith(("to_q.weight", "to_k.weight"))}
    assert all(torch.equal(unet.state_dict()[key], untouched.state_dict()[key]) for key in others)


def test_softening_again_changes_nothing() -> None:
    unet = network(3000.0)
    soften(unet, draws())
    once = {key: value.clone() for key, value in unet.state_dict().items()}
    soften(unet, draws())
    for key, value in unet.state_dict().items():
        torch.testing.assert_close(value, once[key], rtol=1e-5, atol=0)


def test_a_head_bounded_after_each_step_stays_soft_in_training() -> None:
    """Both train to make attention hard; one has its heads bounded after each step."""

    def trained(bound: float | None) -> float:
        unet = network().train()
        optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-2)
        for _ in range(12):
            seen: dict[Attention, torch.Tensor] = {}

            def keep_peaks(
                _: str, module: Attention, logits: torch.Tensor, seen: dict[Attention, torch.Tensor] = seen
            ) -> None:
                seen[module] = peaks(logits)

            with watched(unet, keep_peaks):
                unet(draws().noisy, draws().timesteps, draws().condition)
            module = modules(unet)[CROSS]
            query, key = module.to_q.weight, module.to_k.weight
            (-(query.square().mean() + key.square().mean())).backward()
            optimizer.step()
            optimizer.zero_grad()
            if bound is not None:
                for each, peak in seen.items():
                    bound_heads(each, peak, bound)
        return float(read_peaks(unet)[CROSS].max())

    assert trained(None) > 15
    assert trained(3.0) < 6


def test_a_projection_with_a_bias_is_scaled_whole() -> None:
    module = Attention(query_dim=8, heads=2, dim_head=4, bias=True)
    hidden = 9 * torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    readings: list[torch.Tensor] = []
    with watched(module, lambda name, module, logits: readings.append(peaks(logits))):
        module(hidden)
        assert bound_heads(module, readings[0], 0.1) == 2
        module(hidden)
    torch.testing.assert_close(readings[1], torch.full((2,), 0.1))


# --- the bar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "met"), [(0.0, True), (10.0, True), (10.1, False), (100.0, False)])
def test_hard_queries_have_a_bar_that_can_be_missed(value: float, met: bool) -> None:
    assert evaluate.verdict("hard queries, down 2.0 self, %", value) == ("≤ 10", met)
    page = evaluate.page(
        {"sha256": "0", "figures": {"the U-Net's attention": {"hard queries, down 2.0 self, %": value}}}, {}
    )
    assert ("**no**" in page) is not met


def test_the_text_encoder_is_reported_without_a_bar() -> None:
    assert evaluate.verdict("hard, layer 1, %", 100.0) is None


def test_a_hardened_module_of_the_bundled_model_misses_the_bar_and_is_named() -> None:
    pipe = StableDiffusionPipeline.from_pretrained(mini.path(), safety_checker=None)
    soften(pipe.unet, held_draws(pipe, 8), 6.0)
    module = pipe.unet.get_submodule("up_blocks.1.attentions.0.transformer_blocks.0.attn2")
    module.to_q.weight.data *= 1000
    figures = evaluate.attention(pipe, count=8)
    unet = {key: value for key, value in figures["the U-Net's attention"].items() if "hard" in key}
    assert len(unet) == 14
    verdicts = {key: evaluate.verdict(key, value) for key, value in unet.items()}
    assert [key for key, verdict in verdicts.items() if verdict and not verdict[1]] == ["hard queries, up 1.0 cross, %"]
    assert None not in verdicts.values()
    assert len(figures["the text encoder's attention"]) == 3
