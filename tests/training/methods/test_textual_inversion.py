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


def condition(backbone: Backbone, prompt: str) -> Tensor:
    hidden: Tensor = backbone.text_encoder(backbone.tokenize([prompt]))[0]
    return hidden


def test_the_new_word_starts_as_its_initializer(backbone: Backbone) -> None:
    expected = condition(backbone, "a photo of mug on the beach").detach()
    method = TextualInversion(backbone, "<thing>", "mug")
    assert method.rows.shape == (1, 32)
    assert method.rows.dtype == torch.float32
    assert torch.equal(condition(backbone, "a photo of <thing> on the beach"), expected)


def test_prompts_without_the_word_are_read_as_before(backbone: Backbone) -> None:
    expected = condition(backbone, "a dark cat").detach()
    method = TextualInversion(backbone, "<thing>", "mug", 3)
    with torch.no_grad():
        method.rows.fill_(9.0)
    assert torch.equal(condition(backbone, "a dark cat"), expected)


def test_only_the_new_rows_learn_and_decay(backbone: Backbone) -> None:
    before = {id(weight): weight.clone() for network in backbone.modules for weight in network.parameters()}
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    first = method.rows.detach().clone()
    optimizer = torch.optim.AdamW(method.parameters, lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(condition(backbone, method.expand("a photo of <thing>")).square().sum())
        optimizer.step()
    assert not torch.equal(method.rows, first)
    for network in backbone.modules:
        for weight in network.parameters():
            if weight is not method.rows:
                assert weight.grad is None
                assert torch.equal(weight, before[id(weight)])


def test_copies_of_one_word_are_parted_by_their_gradients(backbone: Backbone) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    assert torch.equal(method.rows[0], method.rows[1])
    torch.autograd.backward(condition(backbone, method.expand("a photo of <thing>"))[:, :8, 0].sum())
    assert method.rows.grad is not None
    assert not torch.equal(method.rows.grad[0], method.rows.grad[1])


@pytest.mark.parametrize("vectors", [1, 2, 11])
def test_a_prompt_is_written_out_as_a_stock_pipeline_does(backbone: Backbone, vectors: int) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", vectors)
    stock = StableDiffusionPipeline.maybe_convert_prompt
    prompt = "a photo of <thing> and the <thing>, by night"
    expanded = method.expand(prompt)
    loader = StableDiffusionPipeline.__new__(StableDiffusionPipeline)
    assert expanded == stock(loader, prompt, backbone.tokenizer)
    ids = backbone.tokenize([expanded])[0].tolist()
    first = backbone.tokenizer.convert_tokens_to_ids("<thing>")
    assert [index for index in ids if index >= first] == [*range(first, first + vectors)] * 2


def test_what_was_learned_can_be_taken_out_and_put_back(backbone: Backbone, tiny_model: Path) -> None:
    method = TextualInversion(backbone, "<thing>", "mug", 2)
    with torch.no_grad():
        method.rows.normal_(generator=torch.Generator().manual_seed(0))
    state = method.state
    assert {name: tensor.shape for name, tensor in state.items()} == {"<thing>": (2, 32)}
    other = load_backbone(tiny_model, device="cpu")
    TextualInversion(other, "<thing>", "cat", 2).load(state)
    prompt = method.expand("a photo of <thing>")
    assert torch.equal(condition(other, prompt), condition(backbone, prompt))
    with torch.no_grad():
        method.rows.zero_()
    assert state["<thing>"].abs().sum() > 0


def test_a_piece_of_the_vocabulary_can_be_the_initializer(backbone: Backbone) -> None:
    # "th" begins words and is none by itself: with "</w>" it would be spelled t, h.
    assert len(backbone.tokenizer("th", add_special_tokens=False).input_ids) > 1
    method = TextualInversion(backbone, "<thing>", "th")
    words = backbone.text_encoder.get_input_embeddings().table.weight
    assert torch.equal(method.rows[0], words[token_id(backbone.tokenizer, "th")])
