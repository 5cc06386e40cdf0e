"""DreamBooth-LoRA: a low-rank change of the U-Net's attention is learned, and with it, where wished, a new word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.randomness import seeded_globals
from dvar.trainer.loading import LORA
from dvar.trainer.methods.textual_inversion import TextualInversion

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class DreamBoothLora:
    """A product of two thin matrices beside each attention matrix of the U-Net, whose own weights stay frozen.

    From construction on, the U-Net adds alpha / ``rank`` times the product to what each matrix in `TARGETS` gives, for
    self- and cross-attention alike (``alpha`` is ``rank`` unless given).  Both matrices are float32 whatever the
    U-Net's precision; the first is drawn by ``seed``, Gaussian with the spread 1 / rank, and the second is zero, so
    that the untouched model is the base.  With a ``placeholder`` its vectors are learned too, as by `TextualInversion`.

    Source: Sections 2.3 and 4.1, and the released code: a new token's embedding and LoRA of rank 4, one learning rate.
    Deviates: attention alone is adapted, as in diffusers' script that the paper cites; the released code also adapts
    the feed-forward gates.  Without a placeholder it is that script: LoRA alone, the text encoder frozen.
    """

    def __init__(
        self,
        backbone: Backbone,
        placeholder: str | None = None,
        initializer: str | None = None,
        num_vectors: int = 1,
        *,
        rank: int = 4,
        alpha: int | None = None,
        seed: int = 0,
    ) -> None:
        self.word = TextualInversion(backbone, placeholder, str(initializer), num_vectors) if placeholder else None
        self.adapter = LoraConfig(
            r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(TARGETS)
        )
        with seeded_globals(seed, "lora"):
            backbone.unet.add_adapter(self.adapter)
        self.matrices: dict[str, nn.Parameter] = {}
        for name, weight in backbone.unet.named_parameters():
            if weight.requires_grad:  # the base is frozen, so these are the adapter's
                weight.data = weight.data.float()
                self.matrices[f"unet.{name.replace('.default', '')}"] = weight

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [*(self.word.parameters if self.word else ()), *self.matrices.values()]

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with the word, where there is one, written out as all of its tokens."""
        return self.word.expand(prompt) if self.word else prompt

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what was learned, on the CPU: the matrices by diffusers' names, the vectors by their word."""
        copies = {name: weight.detach().to("cpu", copy=True) for name, weight in self.matrices.items()}
        return {**(self.word.state if self.word else {}), **copies}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        if self.word:
            self.word.load(state)
        with torch.no_grad():
            for name, weight in self.matrices.items():
                weight.copy_(state[name])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the files others load: file name to what is in it."""
        word = self.word.files(state) if self.word else {}
        return {**word, LORA: {name: state[name] for name in self.matrices}}

    @property
    def metadata(self) -> dict[str, str]:
        """What the files must say of themselves: rank, alpha and targets, as diffusers writes and reads them."""
        return {LORA_ADAPTER_METADATA_KEY: json.dumps(_plain(self.adapter.to_dict()), indent=2, sort_keys=True)}


def _plain(adapter: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's settings under the U-Net's prefix; sets, whose order would differ between runs, as sorted lists."""
    return {f"unet.{name}": sorted(value) if isinstance(value, set) else value for name, value in adapter.items()}
