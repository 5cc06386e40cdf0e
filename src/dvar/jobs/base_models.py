"""A base model that a worker loads once, for all of its runs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

from torch import nn

from dvar.config.training import TrainingConfig
from dvar.diffusion.backbone import Backbone
from dvar.training.pack_fit import LOADED_BY
from dvar.training.personalise import load_base_model


class BaseModels:
    """A loader that holds the last base model and returns copies of it.

    A copy has networks, tokenizers and caches of its own and shares the weights, which stay frozen: a method adds
    parameters beside them.

    Args:
        load: Loads the base model of a config.
    """

    def __init__(self, load: Callable[[TrainingConfig], Backbone] = load_base_model) -> None:
        self.load = load
        self._key: tuple[Any, ...] = ()
        self._model: Backbone | None = None

    def __call__(self, config: TrainingConfig) -> Backbone:
        """Return a copy of the base model of ``config``, untouched by any run before."""
        # A compiled network cannot be copied, nor one whose weights have another form, or are not all in one place.
        if config.compile or config.quantize != "no" or config.offload:
            return self.load(config)
        key = tuple(getattr(config, name) for name in LOADED_BY)
        if self._model is None or key != self._key:
            self._model = None  # never two of them in memory
            gc.collect()  # a run and its probe hold each other, and the copy of the model that they had
            self._model, self._key = self.load(config), key
        return copy_sharing_weights(self._model)


def copy_sharing_weights(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone whose parameters are others, over the same numbers in memory."""
    weights = [weight for network in backbone.modules for weight in network.parameters()]
    shared: dict[int, Any] = {
        id(weight): nn.Parameter(weight.detach(), requires_grad=weight.requires_grad) for weight in weights
    }
    return copy.deepcopy(backbone, shared)
