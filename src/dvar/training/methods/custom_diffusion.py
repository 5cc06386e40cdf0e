"""Custom Diffusion: the embeddings of placeholder tokens and the U-Net's cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.devices import copy_to_cpu
from dvar.errors import RefusedInput
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.run_layout import ATTENTION

LAYERS = {"crossattn_kv": ("to_k", "to_v"), "crossattn": ("to_q", "to_k", "to_v", "to_out.0")}


class CustomDiffusion:
    """The vectors of placeholder tokens and the cross-attention of the U-Net, whose other weights stay frozen.

    From construction on, the `LAYERS` of ``part`` in each cross-attention of the U-Net hold float32 copies of their
    weights, whatever the U-Net's precision, and no gradient reaches keys and values at the first position of a prompt,
    where no word stands. Each token is learned as by `TextualInversion`; no other row of the vocabulary is trained or
    decayed.

    Args:
        backbone: The base model.
        tokens: The initializer token of each placeholder token.
        num_vectors: Vectors of each token.
        part: What is trained, a key of `LAYERS`.

    Raises:
        RefusedInput: The denoising network is no U-Net, or several concepts meet several text encoders.

    Source: Section 2.3 (keys and values of cross-attention, and the token's embedding); the first position is left out
        as in the method's own code.
    Deviates: That code zeroes the gradients of the vocabulary's other rows and lets AdamW decay them.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Mapping[str, str],
        num_vectors: int = 1,
        *,
        part: str = "crossattn_kv",
    ) -> None:
        if backbone.denoiser_name != "unet":
            raise RefusedInput(
                f"custom-diffusion trains the cross-attention of a U-Net, and a {backbone.title} has none: "
                "use dreambooth-lora"
            )
        if len(tokens) > 1 and len(backbone.towers) > 1:
            raise RefusedInput(
                f"custom-diffusion learns one concept at a time on a {backbone.title}, got {len(tokens)}: "
                "train them one by one"
            )
        self.tokens = [
            TextualInversion(backbone, placeholder_token, initializer_token, num_vectors)
            for placeholder_token, initializer_token in tokens.items()
        ]
        self.weights: dict[str, nn.Parameter] = {}
        for name, attention in backbone.denoiser.named_modules():
            if not name.endswith(".attn2"):  # cross-attention, by diffusers' name
                continue
            for place in LAYERS[part]:
                layer = attention.get_submodule(place)
                for kind, weight in list(layer.named_parameters()):
                    copy = nn.Parameter(weight.detach().to(torch.float32, copy=True))
                    setattr(layer, kind, copy)
                    self.weights[f"{name}.{place}.{kind}"] = copy
                if place in LAYERS["crossattn_kv"]:
                    layer.register_forward_hook(_detach_first_position)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [*(part for token in self.tokens for part in token.parameters), *self.weights.values()]

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with all tokens of each placeholder token written out, as a stock pipeline does."""
        for token in self.tokens:
            prompt = token.expand(prompt)
        return prompt

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what is learned, on the CPU: whole weights by the U-Net's names, the vectors by their token."""
        copies = copy_to_cpu(self.weights)
        return {
            name: part for state in (*(token.state for token in self.tokens), copies) for name, part in state.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        for token in self.tokens:
            token.load(state)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state[name])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the weight files that stock diffusers loads: file name to tensors by name."""
        files: dict[str, dict[str, Tensor]] = {}
        for token in self.tokens:
            for name, vectors in token.files(state).items():
                files[name] = {**files.get(name, {}), **vectors}
        return {**files, ATTENTION: {name: state[name] for name in self.weights}}

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weight files: none."""
        return {}


def _detach_first_position(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Return keys or values [B, L, dim] unchanged, without gradient at the first position."""
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1) if output.requires_grad else output
