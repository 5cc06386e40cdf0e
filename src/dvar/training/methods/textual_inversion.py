"""Textual Inversion: the embedding of a placeholder token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.training.placeholder_tokens import token_names
from dvar.training.run_layout import EMBEDS
from dvar.training.token_initializer import initial_rows


class TextualInversion:
    """The vectors of a placeholder token, put into a backbone whose own weights stay frozen.

    From construction on, the backbone's tokenizer knows the token and its text encoder reads the vectors in ``rows``,
    a float32 parameter [num_vectors, dim]. It alone is trained and decayed: the vocabulary has no gradient and cannot
    drift.

    Args:
        backbone: The base model.
        placeholder_token: The new token.
        initializer_token: The known token whose embedding it starts from.
        num_vectors: Vectors of the token.

    Source: Section 2.3 (the embedding of the new token is all that is trained).
    Deviates: Several vectors a token are an extension; the paper uses one.
    """

    def __init__(
        self, backbone: Backbone, placeholder_token: str, initializer_token: str, num_vectors: int = 1
    ) -> None:
        self.placeholder_token = placeholder_token
        self.names = list(token_names(placeholder_token, num_vectors))
        rows = initial_rows(backbone.tokenizer, backbone.text_encoder, initializer_token, num_vectors)
        self.rows = nn.Parameter(rows.to(backbone.device))
        backbone.tokenizer.add_tokens(self.names)
        first = backbone.tokenizer.convert_tokens_to_ids(placeholder_token)
        backbone.text_encoder.set_input_embeddings(
            ExtendedEmbedding(backbone.text_encoder.get_input_embeddings(), self.rows, first)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [self.rows]

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with all tokens of the placeholder token written out, as a stock pipeline does."""
        return prompt.replace(self.placeholder_token, " ".join(self.names))

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what is learned, on the CPU: the vectors by their token."""
        return {self.placeholder_token: self.rows.detach().cpu().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        with torch.no_grad():
            self.rows.copy_(state[self.placeholder_token])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the weight files that stock diffusers loads: file name to tensors by name."""
        return {EMBEDS: {self.placeholder_token: state[self.placeholder_token]}}

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weight files: none."""
        return {}


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table that looks up ids from ``first`` on in ``rows``."""

    def __init__(self, table: nn.Module, rows: Tensor, first: int) -> None:
        super().__init__()
        self.table, self.rows, self.first = table, rows, first

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of ``input_ids`` [B, L], [B, L, dim]."""
        is_new = input_ids >= self.first
        frozen: Tensor = self.table(input_ids.masked_fill(is_new, 0))
        learned = F.embedding((input_ids - self.first).clamp(min=0), self.rows)
        return torch.where(is_new.unsqueeze(-1), learned.to(frozen.dtype), frozen)
