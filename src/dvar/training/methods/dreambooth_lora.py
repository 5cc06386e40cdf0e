"""DreamBooth-LoRA: a low-rank change of attention and, optionally, the embedding of a placeholder token."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from torch import Tensor, nn

from dvar.diffusion.backbone import Backbone
from dvar.diffusion.devices import copy_to_cpu
from dvar.diffusion.randomness import seeded_globals
from dvar.errors import RefusedInput
from dvar.training.methods.textual_inversion import TextualInversion
from dvar.training.run_layout import LORA

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The matrices of the text encoder that are adapted, under the names of transformers."""


class DreamBoothLora:
    """A product of two thin matrices beside each attention matrix of the denoising network, whose weights stay frozen.

    From construction on, the network adds alpha / ``rank`` times the product to the output of each adapted matrix. Both
    thin matrices are float32 whatever the network's precision; the first is drawn by ``seed``, Gaussian with standard
    deviation 1 / rank, and the second is zero, so that the untouched model is the base.

    Args:
        backbone: The base model.
        placeholder_token: A new token that is learned too, as by `TextualInversion`; by default there is none.
        initializer_token: The known token whose embedding it starts from.
        num_vectors: Vectors of the token.
        rank: Rank of the product.
        alpha: Numerator of its scale; by default the rank.
        targets: Which matrices of the denoising network are adapted, a key of the backbone's ``lora_targets``.
        seed: Seed of the first matrices.
        text_encoder: Adapt the attention of the CLIPs among the text encoders too.
        dora: Learn the length of each row of an adapted matrix too, and only its direction by the product.
        plus_ratio: How many times as fast as the first matrices the second ones learn; by default as fast.
        text_ratio: How many times as fast as the denoising network the text encoders learn, with the new word.

    Raises:
        RefusedInput: The backbone has no such targets, or no CLIP to adapt.

    Source: Sections 2.3 and 4.1, and the released code: a new token's embedding and LoRA of rank 4, one learning rate.
        Liu et al., DoRA (2024), as in PEFT and diffusers' scripts; Hayou et al., LoRA+ (2024), for the ratio.
    Deviates: By default only attention is adapted, as in diffusers' script that the paper cites; the released code also
        adapts the feed-forward gates. Without a placeholder token it is that script: LoRA alone, on the U-Net or on
        both networks.
    """

    def __init__(
        self,
        backbone: Backbone,
        placeholder_token: str | None = None,
        initializer_token: str | None = None,
        num_vectors: int = 1,
        *,
        rank: int = 4,
        alpha: int | None = None,
        targets: str = "attention",
        seed: int = 0,
        text_encoder: bool = False,
        dora: bool = False,
        plus_ratio: float | None = None,
        text_ratio: float = 1.0,
    ) -> None:
        self.plus_ratio, self.text_ratio = plus_ratio or 1.0, text_ratio
        self.adapters: dict[str, LoraConfig] = {}
        self.matrices: dict[str, nn.Parameter] = {}
        if targets not in backbone.lora_targets:
            raise RefusedInput(
                f"lora_targets of {backbone.title} must be one of {', '.join(backbone.lora_targets)}, got {targets!r}"
            )
        parts = [(backbone.denoiser_name, backbone.denoiser, backbone.lora_targets[targets])]
        names_of_clips = (tower for tower in backbone.towers if text_encoder and tower.name.startswith("text_encoder"))
        towers = [tower for tower in names_of_clips if tower.embeds_key is not None]
        if text_encoder and not towers:
            raise RefusedInput(f"train_text_encoder adapts a CLIP, and a {backbone.title} has none: drop it")
        parts += [(tower.name, tower.encoder, TEXT_TARGETS) for tower in towers]
        for prefix, network, names in parts:
            self.adapters[prefix] = LoraConfig(
                r=rank,
                lora_alpha=alpha or rank,
                init_lora_weights="gaussian",
                target_modules=list(names),
                use_dora=dora,
            )
            with seeded_globals(seed, "lora" if network is backbone.denoiser else f"lora/{prefix}"):
                network.add_adapter(self.adapters[prefix])
            for name, weight in network.named_parameters():
                if ".lora_" in name:
                    weight.data = weight.data.float()
                    self.matrices[_exported_name(prefix, name)] = weight
        # After the adapters, for adding one freezes whatever else a network could learn.
        self.token = (
            TextualInversion(backbone, placeholder_token, str(initializer_token), num_vectors)
            if placeholder_token
            else None
        )

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [*(self.token.parameters if self.token else ()), *self.matrices.values()]

    @property
    def rate_factors(self) -> list[float]:
        """The learning rate of each of ``parameters``, as a multiple of the config's."""
        factors = [
            (self.plus_ratio if ".lora_B." in name else 1.0)
            * (self.text_ratio if name.startswith("text_encoder") else 1.0)
            for name in self.matrices
        ]
        return [self.text_ratio] * (len(self.parameters) - len(factors)) + factors

    def freeze_word(self) -> None:
        """Train the new word no further; the text encoders, in which nothing else is trained, are frozen with it."""
        if self.token:
            self.token.freeze()

    def expand(self, prompt: str) -> str:
        """Return ``prompt`` with all tokens of the placeholder token, if any, written out."""
        return self.token.expand(prompt) if self.token else prompt

    @property
    def state(self) -> dict[str, Tensor]:
        """A copy of what is learned, on the CPU: the matrices by diffusers' names, the vectors by their token."""
        copies = copy_to_cpu(self.matrices)
        return {**(self.token.state if self.token else {}), **copies}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` returned."""
        if self.token:
            self.token.load(state)
        with torch.no_grad():
            for name, weight in self.matrices.items():
                weight.copy_(state[name])

    def files(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return a ``state`` as the weight files that stock diffusers loads: file name to tensors by name."""
        embeds = self.token.files(state) if self.token else {}
        return {**embeds, LORA: {name: state[name] for name in self.matrices}}

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of the weight files: rank, alpha and targets, as diffusers writes and reads them."""
        settings = {
            f"{prefix}.{name}": sorted(value) if isinstance(value, set) else value  # whose order differs between runs
            for prefix, adapter in self.adapters.items()
            for name, value in adapter.to_dict().items()
        }
        return {LORA_ADAPTER_METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)}


def _exported_name(prefix: str, name: str) -> str:
    """Return the name of an adapter's matrix for other loaders, which keep a level of older text encoders."""
    inner = name.replace(".default", "")
    if prefix.startswith("text_encoder"):
        return f"{prefix}.text_model.{inner.removeprefix('text_model.')}"
    if "lora_magnitude_vector" in inner:  # its loader adds what PEFT's own module does, and that of encoders does not
        inner = inner.removesuffix(".weight")
    return f"{prefix}.{inner}"
