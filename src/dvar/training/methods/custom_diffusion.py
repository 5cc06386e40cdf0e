"""Custom Diffusion: new words are learned, and with them the cross-attention through which the U-Net reads words."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.run_layout import ATTENTION, EMBEDS

LAYERS = {"crossattn_kv": ("to_k", "to_v"), "crossattn": ("to_q", "to_k", "to_v", "to_out.0")}


class CustomDiffusion:
    """The new words' vectors and the cross-attention of the U-Net, whose every other weight stays frozen.

    ``words``: each new word and the known one that it starts from.

    From construction on, the `LAYERS` of ``part`` in each cross-attention of the U-Net hold float32 copies of their
    weights, whatever the U-Net's precision, and no gradient reaches keys and values at the first place of a prompt,
    where no word stands.  Each word is learned as `TextualInversion` does; no other row of the vocabulary is trained
    or decayed.

    Source: Section 2.3 (keys and values of cross-attention, and the token's embedding); the first place is left out as
    in the method's own code.
    Deviates: that code zeroes the gradients of the vocabulary's other rows and lets AdamW decay them.
    """

    def __init__(
        self,
        backbone: Backbone,
        words: Mapping[str, str],
        num_vectors: int = 1,
        *,
        part: str = "crossattn_kv",
    ) -> None:
        self.words = [TextualInversion(backbone, new, known, num_vectors) for new, known in words.items()]
        self.weights: dict[str, nn.Parameter] = {}
        for name, attention in backbone.unet.named_modules():
            if not name.endswith(".attn2"):  # cross-attention, by diffusers' name
                continue
            for place in LAYERS[part]:
                layer = attention.get_submodule(place)
                for kind, weight in list(layer.named_parameters()):
                    own = nn.Parameter(weight.detach().to(torch.float32, copy=True))
                    setattr(layer, kind, own)
                    self.weights[f"{name}.{place}.{kind}"] = own
                if place in LAYERS["crossattn_kv"]:
                    layer.register_forward_hook(_first_place_held)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer moves."""
        return [*(word.rows for word in self.words), *self.weights.values()]

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with each word written out as all of its tokens, as a stock pipeline does by itself."""
        for word in self.words:
            prompt = word.expand(prompt)
        return prompt

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what was learned, on the CPU: whole weights by the U-Net's own names, the vectors by their word."""
        copies = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        return {name: part for state in (*(word.state for word in self.words), copies) for name, part in state.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        for word in self.words:
            word.load(state)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[name])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the files others load: file name to what is in it."""
        words = {word.placeholder: state[word.placeholder] for word in self.words}
        return {EMBEDS: words, ATTENTION: {name: state[name] for name in self.weights}}

    @property
    def metadata(self) -> dict[str, str]:
        """What the files must say of themselves: nothing."""
        return {}


def _first_place_held(layer: nn.Module, inputs: tuple[Tensor, ...], found: Tensor) -> Tensor:
    """Return keys or values [B, L, dim] as they are, those of the first place without their gradient."""
    return torch.cat([found[:, :1].detach(), found[:, 1:]], dim=1) if found.requires_grad else found
