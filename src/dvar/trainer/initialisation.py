"""The first vectors of a new word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
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
    embedding = text_encoder.get_input_embeddings()
    place = torch.tensor([token_id(tokenizer, initializer)], device=text_encoder.device)
    with torch.no_grad():
        return embedding(place).float().repeat(count, 1)
