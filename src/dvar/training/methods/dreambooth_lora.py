"""DreamBooth-LoRA: a low-rank change of attention is learned, and with it, where wished, a new word."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.randomness import seeded_globals
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.run_layout import LORA

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TARGETS = {
    "attention": _ATTENTION,
    "cross-attention": tuple(f"attn2.{name}" for name in _ATTENTION),
    "attention+gates": (*_ATTENTION, "ff.net.0.proj"),
}
"""By choice, the matrices of the U-Net that are adapted, under diffusers' names."""
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""Those of the text encoder, under the names of transformers."""


class DreamBoothLora:
    """A product of two thin matrices beside each attention matrix of the U-Net, whose own weights stay frozen.

    From construction on, the U-Net adds alpha / ``rank`` times the product to what each matrix gives that ``targets``
    names in `TARGETS` (``alpha`` is ``rank`` unless given); with ``text_encoder`` the text encoder does so too, to all
    of its attention.  Both matrices are float32 whatever the U-Net's precision; the first is drawn by ``seed``,
    Gaussian with the spread 1 / rank, and the second is zero, so that the untouched model is the base.  With a
    ``placeholder`` its vectors are learned too, as by `TextualInversion`.

    Source: Sections 2.3 and 4.1, and the released code: a new token's embedding and LoRA of rank 4, one learning rate.
    Deviates: attention alone is adapted unless asked, as in diffusers' script that the paper cites; the released code
    also adapts the feed-forward gates.  Without a placeholder it is that script: LoRA alone, on the U-Net or on both
    networks.
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
        targets: str = "attention",
        seed: int = 0,
        text_encoder: bool = False,
    ) -> None:
        self.adapters: dict[str, LoraConfig] = {}
        self.matrices: dict[str, nn.Parameter] = {}
        for prefix, names in [("unet", TARGETS[targets]), ("text_encoder", TEXT_TARGETS)][: 1 + text_encoder]:
            network = getattr(backbone, prefix)
            known = {id(weight) for weight in network.parameters()}
            self.adapters[prefix] = LoraConfig(
                r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=list(names)
            )
            with seeded_globals(seed, "lora" if prefix == "unet" else f"lora/{prefix}"):
                network.add_adapter(self.adapters[prefix])
            for name, weight in network.named_parameters():
                if id(weight) not in known:
                    weight.data = weight.data.float()
                    self.matrices[_exported(prefix, name)] = weight
        # After the adapters, for adding one freezes whatever else a network could learn.
        self.word = TextualInversion(backbone, placeholder, str(initializer), num_vectors) if placeholder else None

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
        told = {
            f"{prefix}.{name}": sorted(value) if isinstance(value, set) else value  # whose order differs between runs
            for prefix, adapter in self.adapters.items()
            for name, value in adapter.to_dict().items()
        }
        return {LORA_ADAPTER_METADATA_KEY: json.dumps(told, indent=2, sort_keys=True)}


def _exported(prefix: str, name: str) -> str:
    """The name by which every loader knows an adapter's matrix; in older text encoders it has one level more."""
    inner = name.replace(".default", "")
    if prefix == "text_encoder" and not inner.startswith("text_model."):
        inner = f"text_model.{inner}"
    return f"{prefix}.{inner}"
