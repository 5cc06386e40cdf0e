"""A language model as a text encoder: prompts in a template, and padding that can be told from text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from dvar.diffusion.backbones.stock import TextTower

PADDING = -1
"""The id of a place without text; the tokenizer's own padding can be text too."""


@dataclass(frozen=True)
class LanguageTower(TextTower):
    """A text encoder that is a language model.

    Attributes:
        template: Returns the text that the model reads for a prompt.
    """

    template: Callable[[str], str] = str

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """Return the token ids of ``prompts`` in their template, int64 [n, length], cut or filled with `PADDING`."""
        encoded = self.tokenizer(
            [self.template(prompt) for prompt in prompts],
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        ids: Tensor = encoded.input_ids
        return ids.masked_fill(encoded.attention_mask == 0, PADDING)


def as_text(tower: TextTower, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the token ids of a language model as it reads them, and where they are text, int64 [B, L]."""
    mask = (input_ids != PADDING).long()
    return input_ids.masked_fill(mask == 0, tower.tokenizer.pad_token_id), mask


def chat_template(tokenizer: object, *, thinking: bool) -> Callable[[str], str]:
    """Return a template that puts a prompt as what the user of a chat says.

    Args:
        tokenizer: The tokenizer, which has the template.
        thinking: Whether the answer may begin with a thought; otherwise an empty one stands there.
    """

    def template(prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        text: str = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            [message], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        return text

    return template
