"""Textual Inversion: the vectors of a placeholder token and the prompts that contain it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dvar.diffusion.backbone import Backbone, load_backbone
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.placeholder_tokens import token_id


@pytest.fixture
def backbone(tiny_model: Path) -> Backbone:
    return load_backbone(tiny_model, device="cpu")


def encode_prompt(backbone: Backbone, prompt: str) -> Tensor:
    hidden: Tensor = backbone.text_encoder(backbone.tokenize([prompt]))[0]
    return hidden


def test_the_placeholder_token_starts_as_its_initializer(backbone: Backbone) -> None:
    expected = encode_prompt(backbone, "a photo of mug on the beach").detach()
    method = TextualInversion(backbone, "<thing>", "mug")
    assert method.rows.shape == (1, 32)
    assert method.rows.dtype == torch.float32
    assert torch.equal(encode_prompt(backbone, "a photo of <thing> on the beach"), expected)


def test_prompts_without_the_placeholder_token_are_encoded_as_before(backbone: Backbone) -> None:
    expected = encode_prompt(backbone, "a dark cat").detach()
    method = TextualInversion(backbone, "<thing>", "mug", 3)
    with torch.no_grad():
        method.rows.fill_(9.0)
    assert torch.equal(encode_prompt(backbone, "a dark cat"), expected)


def test_only_the_new_rows_learn_and_decay(backbone: Backbone) -> None:
    before = {id(weight): weight.clone() for network in backbone.modules for weight in network.parameters()}
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    initial_rows = method.rows.detach().clone()
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(encode_prompt(backbone, method.expand("a photo of <thing>")).square().sum())
        optimizer.step()
    assert not torch.equal(method.rows, initial_rows)
    for network in backbone.modules:
        for weight in network.parameters():
            if weight is not method.rows:
                assert weight.grad is None
                assert torch.equal(weight, before[id(weight)])


def test_vectors_of_one_placeholder_token_have_different_gradients(backbone: Backbone) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    assert torch.equal(method.rows[0], method.rows[1])
    torch.autograd.backward(encode_prompt(backbone, method.expand("a photo of <thing>"))[:, :8, 0].sum())
    assert method.rows.grad is not None
    assert not torch.equal(method.rows.grad[0], method.rows.grad[1])


@pytest.mark.parametrize("vectors", [1, 2, 11])
def test_a_prompt_is_expanded_as_by_a_stock_pipeline(backbone: Backbone, vectors: int) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", vectors)
    stock = StableDiffusionPipeline.maybe_convert_prompt
    prompt = "a photo of <thing> and the <thing>, by night"
    expanded = method.expand(prompt)
    loader = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    assert expanded == stock(loader, prompt, backbone.tokenizer)
    ids = backbone.tokenize([expanded])[0].tolist()
    first_id = backbone.tokenizer.convert_tokens_to_ids("<thing>")
    assert [token_id for token_id in ids if token_id >= first_id] == [*range(first_id, first_id + vectors)] * 2


def test_the_learned_state_can_be_saved_and_restored(backbone: Backbone, tiny_model: Path) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    with torch.no_grad():
        method.rows.normal_(generator=torch.Generator().manual_seed(0))
    state = method.state
    assert {name: tensor.shape for name, tensor in state.items()} == {"<thing>": (2, 32)}
    restored = load_backbone(tiny_model, device="cpu")
    TextualInversion(restored, "<thing>", "cat", 2).load(state)
    prompt = method.expand("a photo of <thing>")
    assert torch.equal(encode_prompt(restored, prompt), encode_prompt(backbone, prompt))
    with torch.no_grad():
        method.rows.zero_()
    assert state["<thing>"].abs().sum() > 0


def test_a_word_piece_can_be_the_initializer(backbone: Backbone) -> None:
    # "th" begins words but is no word itself: with "</w>" it would be two tokens, t and h.
    assert len(backbone.tokenizer("th", add_special_tokens=False).input_ids) > 1
    method = TextualInversion(backbone, "<thing>", "th")
    vectors = backbone.text_encoder.get_input_embeddings().table.weight
    assert torch.equal(method.rows[0], vectors[token_id(backbone.tokenizer, "th")])
