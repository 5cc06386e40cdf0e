"""The state in which a script computes its loss on a held sample: nothing that it does is left behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from dvar.launch.draws import fix_draws
from dvar.stopping.probe import preserve_state

PRIOR_WEIGHT = "prior_loss_weight"
"""The setting of diffusers' scripts by which the loss on class images is multiplied."""


@contextmanager
def measurement_scope(accelerator: Any, settings: Any, seed: int, sample: int, samples: int) -> Iterator[None]:
    """Yield for one held sample, without gradient, in evaluation mode and with fixed draws.

    Afterwards every generator, every train or eval flag, the accelerator and the settings are as they were.

    Args:
        accelerator: The accelerator of the script.
        settings: The script's ``args``; None where it has none.
        seed: Seed of this sample.
        sample: Number of this held sample.
        samples: Number of held samples.
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_state(accelerator._models, seed))
        stack.enter_context(_evaluate_called_modules())
        stack.enter_context(_mute(accelerator))
        stack.enter_context(_without_prior_loss(settings))
        stack.enter_context(fix_draws(seed, sample, samples))
        stack.enter_context(_without_gradient())
        yield


@contextmanager
def _without_gradient() -> Iterator[None]:
    enabled = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(enabled)
        # Casts of weights that autocast made without gradient must not be used by a training step in the same scope.
        torch.clear_autocast_cache()


@contextmanager
def _evaluate_called_modules() -> Iterator[None]:
    """Set whatever module is called to evaluation mode before it runs; restore the flags afterwards."""
    training: list[nn.Module] = []

    def evaluate(module: nn.Module, _: Any) -> None:
        if module.training:
            module.training = False
            training.append(module)

    hook = register_module_forward_pre_hook(evaluate)
    try:
        yield
    finally:
        hook.remove()
        for module in training:
            module.training = True


@contextmanager
def _mute(accelerator: Any) -> Iterator[None]:
    """Let the accelerator neither count, nor step, nor gather, nor log inside the scope."""
    state = accelerator.gradient_state
    synced = state.sync_gradients
    silent: dict[str, Any] = {
        "_do_sync": lambda *_, **__: state._set_sync_gradients(False),
        # A gathered loss is only logged: zeros add nothing to it, on any process.
        "gather": _return_zeros,
        "gather_for_metrics": _return_zeros,
        "reduce": _return_zeros,
        "log": lambda *_, **__: None,
    }
    own = {name: vars(accelerator)[name] for name in silent if name in vars(accelerator)}
    vars(accelerator).update(silent)
    state._set_sync_gradients(False)
    try:
        yield
    finally:
        for name in silent:
            del vars(accelerator)[name]
        vars(accelerator).update(own)
        state._set_sync_gradients(synced)


def _return_zeros(tensors: Any, *_: Any, **__: Any) -> Any:
    return recursively_apply(torch.zeros_like, tensors)


@contextmanager
def _without_prior_loss(settings: Any) -> Iterator[None]:
    """Set the weight of the loss on class images to 0, where the script has such a setting."""
    weight = getattr(settings, PRIOR_WEIGHT, None)
    if not isinstance(weight, int | float):
        yield
        return
    setattr(settings, PRIOR_WEIGHT, 0.0)
    try:
        yield
    finally:
        setattr(settings, PRIOR_WEIGHT, weight)
