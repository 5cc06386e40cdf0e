"""The recipe of mini-flow: one empty token counts as all that the stock pipeline passes."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from scipy.stats import kstest

from pretraining.flow import EMPTY_TOKENS, Flow, FoldedAttention, fold, sample_sigmas


def test_one_token_with_a_raised_logit_stands_for_as_many_equal_ones() -> None:
    torch.manual_seed(0)
    transformer = Flow(300).transformer.eval()
    for parameter in transformer.parameters():  # what begins at zero would hide the context
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 8, 16, 16, generator=generator)
    tokens = torch.randn(2, 32, transformer.config.joint_attention_dim, generator=generator)
    pooled = torch.randn(2, transformer.config.pooled_projection_dim, generator=generator)

    def predict(empty: int) -> torch.Tensor:
        context = torch.cat([tokens, torch.zeros(2, empty, tokens.shape[2])], dim=1)
        inputs = {"encoder_hidden_states": context, "pooled_projections": pooled}
        with torch.no_grad():
            sample: torch.Tensor = transformer(latents, timestep=torch.tensor([100.0, 700.0]), **inputs).sample
        return sample

    stock = predict(EMPTY_TOKENS)
    one_as_one = predict(1)
    transformer.set_attn_processor(FoldedAttention())
    assert torch.allclose(predict(1), stock, atol=1e-5)
    assert not torch.allclose(one_as_one, stock, atol=1e-3)
    fold(SimpleNamespace(transformer=transformer))
    assert torch.allclose(predict(EMPTY_TOKENS), stock, atol=1e-5)


def test_sigmas_are_logit_normal() -> None:
    sigmas = torch.cat([sample_sigmas(16, torch.Generator().manual_seed(seed)) for seed in range(50)])
    assert kstest(torch.logit(sigmas).numpy(), "norm").pvalue > 0.01
    assert ((sigmas > 0) & (sigmas < 1)).all()
