"""Textual Inversion: the embedding of a placeholder token."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.devices import copy_to_cpu
from dvar.errors import RefusedInput
from dvar.training.placeholder_tokens import token_names
from dvar.training.run_layout import CLIP_EMBEDS, EMBEDS
from dvar.training.token_initializer import initial_rows


class TextualInversion:
    """The vectors of a placeholder token, put into a backbone whose own weights stay frozen.

    From construction on, the tokenizer of each text encoder knows the token, and the encoder reads its vectors, a
    float32 parameter [num_vectors, dim]. They alone are trained and decayed: the vocabulary has no gradient and cannot
    drift. T5 and language models learn none.

    Args:
        backbone: The base model.
        placeholder_token: The new token.
        initializer_token: The known token whose embedding it starts from.
        num_vectors: Vectors of the token; several where `BackboneEntry.expands_tokens` holds, which preflight checks.

    Raises:
        RefusedInput: No text encoder of the base model can learn one.

    Source: Section 2.3 (the embedding of the new token is all that is trained).
    Deviates: Several vectors a token are an extension; the paper uses one.
    """

    def __init__(
        self, backbone: Backbone, placeholder_token: str, initializer_token: str, num_vectors: int = 1
    ) -> None:
        if all(tower.embeds_key is None for tower in backbone.towers):
            raise RefusedInput(
                f"placeholder_token cannot be learned on a {backbone.title}, whose text encoder is a language model: "
                "train dreambooth-lora on an --instance_prompt alone"
            )
        self.placeholder_token = placeholder_token
        self.names = list(token_names(placeholder_token, num_vectors))
        self.vectors: dict[str, nn.Parameter] = {}
        self.encoders: list[nn.Module] = []
        for tower in backbone.towers:
            if tower.embeds_key is None:
                continue
            rows = initial_rows(tower.tokenizer, tower.encoder, initializer_token, num_vectors)
            vectors = nn.Parameter(rows.to(backbone.device))
            tower.tokenizer.add_tokens(self.names)
            first = tower.tokenizer.convert_tokens_to_ids(placeholder_token)
            table = tower.encoder.get_input_embeddings()
            tower.encoder.set_input_embeddings(ExtendedEmbedding(table, vectors, first))
            self.vectors[tower.embeds_key or placeholder_token] = vectors
            self.encoders.append(tower.encoder)

    @property
    def rows(self) -> nn.Parameter:
        """The vectors that the first text encoder reads."""
        return next(iter(self.vectors.values()))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return list(self.vectors.values())

    def freeze(self) -> None:
        """Train the vectors no further."""
        for vectors in self.vectors.values():
            vectors.requires_grad_(False)
        for encoder in self.encoders:
            encoder.eval()

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with all tokens of the placeholder token written out, as a stock pipeline does."""
        return prompt.replace(self.placeholder_token, " ".join(self.names))

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what is learned, on the CPU: the vectors by their token or, of several encoders, by the encoder."""
        return copy_to_cpu(self.vectors)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        with torch.no_grad():
            for name, vectors in self.vectors.items():
                vectors.copy_(state[name])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the weight files that stock diffusers loads: file name to tensors by name."""
        name = EMBEDS if self.placeholder_token in self.vectors else CLIP_EMBEDS
        return {name: {key: state[key] for key in self.vectors}}

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
