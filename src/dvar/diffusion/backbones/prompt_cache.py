"""Prompts that frozen text encoders have read once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

States = tuple[Tensor, ...]
"""What a text encoder gives for captions, each [B, ...]; a row depends on its own caption alone."""


@dataclass(frozen=True)
class PromptCache:
    """Outputs of frozen text encoders for prompts, so that they need not run again.

    Attributes:
        states: The states of a caption, [1, ...] on the CPU, by the name of the encoder and the token ids.
        calls: What the methods of stock pipelines in ``methods`` returned, by their arguments.
        methods: The methods of stock pipelines that are remembered.
        released: The names of the encoders whose weights are given up.
    """

    states: dict[tuple[str, bytes], States] = field(default_factory=dict)
    calls: dict[str, Any] = field(default_factory=dict)
    methods: set[str] = field(default_factory=set)
    released: set[str] = field(default_factory=set)

    def read(self, name: str, input_ids: Tensor, encode: Callable[[Tensor], States]) -> States:
        """Return the states of captions [B, L], each caption encoded by itself and once.

        By itself, so that the states of a caption do not depend on its batch, and neither does a loss.
        """
        rows = []
        for row in torch.split(input_ids, 1):
            key = name, row.cpu().numpy().tobytes()
            if key not in self.states:
                with torch.no_grad():
                    self.states[key] = tuple(part.cpu() for part in encode(row))
            rows.append(self.states[key])
        return tuple(torch.cat(parts).to(input_ids.device) for parts in zip(*rows, strict=True))

    def remembering(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """Return a ``method`` of a stock pipeline that runs once for the same arguments."""

        def remembered(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(method).bind(*args, **kwargs).arguments
            texts = {name: value for name, value in sorted(arguments.items()) if name != "device"}
            key = f"{method.__name__} {texts}"
            if key not in self.calls:
                self.calls[key] = method(*args, **kwargs)
            return self.calls[key]

        return remembered
