"""The first vectors of a new word."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from dvar.trainer.concept import token_id

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer


def initial_rows(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, initializer: str, count: int) -> Tensor:
    """Return ``count`` copies of the embedding of the one-token word ``initializer``, float32 [count, dim].

    No noise is added: the copies stand at different places of a prompt, so their gradients part them from the first
    step.

    Source: Section 2.3; the first vector is that of a known word, as in Textual Inversion.
    """
    row = text_encoder.get_input_embeddings().weight[token_id(tokenizer, initializer)]
    return row.detach().float().repeat(count, 1)
