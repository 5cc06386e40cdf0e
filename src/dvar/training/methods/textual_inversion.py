"""Textual Inversion: a new word is learned, and nothing else moves."""

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
    """The new word's vectors, put into a backbone whose every own weight stays frozen.

    From construction on, the backbone's tokenizer knows the word and its text encoder reads the vectors in ``rows``,
    a float32 parameter [num_vectors, dim] that alone is trained and decayed: the vocabulary has no gradient and
    cannot drift.

    Source: Section 2.3 (the embedding of the new token is all that is trained).
    Deviates: several vectors a word are the method's own extension (`num_vectors`); the paper uses one.
    """

    def __init__(self, backbone: Backbone, placeholder: str, initializer: str, num_vectors: int = 1) -> None:
        self.placeholder = placeholder
        self.names = list(token_names(placeholder, num_vectors))
        rows = initial_rows(backbone.tokenizer, backbone.text_encoder, initializer, num_vectors)
        self.rows = nn.Parameter(rows.to(backbone.device))
        backbone.tokenizer.add_tokens(self.names)
        first = backbone.tokenizer.convert_tokens_to_ids(placeholder)
        backbone.text_encoder.set_input_embeddings(
            ExtendedEmbedding(backbone.text_encoder.get_input_embeddings(), self.rows, first)
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [self.rows]

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with the word written out as all of its tokens, as a stock pipeline does by itself."""
        return prompt.replace(self.placeholder, " ".join(self.names))

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what was learned, on the CPU: the vectors by their word."""
        return {self.placeholder: self.rows.detach().cpu().clone()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        with torch.no_grad():
            self.rows.copy_(state[self.placeholder])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the files others load: file name to what is in it."""
        return {EMBEDS: {self.placeholder: state[self.placeholder]}}

    @property
    def metadata(self) -> dict[str, str]:
        """What the files must say of themselves: nothing."""
        return {}


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table followed by rows of its own: ids from ``first`` on are looked up in ``rows``."""

    def __init__(self, words: nn.Module, rows: Tensor, first: int) -> None:
        super().__init__()
        self.words, self.rows, self.first = words, rows, first

    def forward(self, input_ids: Tensor) -> Tensor:
        new = input_ids >= self.first
        known = self.words(input_ids.masked_fill(new, 0))
        learned = F.embedding((input_ids - self.first).clamp(min=0), self.rows)
        return torch.where(new.unsqueeze(-1), learned.to(known.dtype), known)
