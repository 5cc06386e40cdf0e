"""The stopping rule of a run."""

from __future__ import annotations

from dvar.config.fields import invalid_fields
from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput
from dvar.stopping.rules import MIN_RECORDS, AnyOf, Dvar, FixedSteps, Rule, schedule_problems

_FIELDS = {"window", "threshold", "probe_every", "max_train_steps", "train_text_encoder_ti_frac"}


def rule_of(config: TrainingConfig) -> Rule:
    """Return the rule that ends a run: DVAR or the cap, whichever comes first."""
    return AnyOf((Dvar(config.window, config.threshold), FixedSteps(config.max_train_steps)))


def problems(config: TrainingConfig) -> list[str]:
    """Return what keeps the rule of ``config`` from being one, or from ever stopping the run."""
    if not _FIELDS.isdisjoint(name for name, _ in invalid_fields(config)):
        return []
    problems: list[str] = []
    try:
        Dvar(window=config.window, threshold=config.threshold)
    except RefusedInput as error:
        problems += error.problems
    if config.window >= MIN_RECORDS:
        problems += schedule_problems(config.window, config.probe_every, config.max_train_steps)
    after_pivot = config.max_train_steps - config.pivot_step
    if after_pivot <= config.window < config.max_train_steps:
        message = f"window must be smaller than the steps with a frozen word, got window {config.window}"
        problems.append(f"{message} and {after_pivot} steps: shorten it, or lower train_text_encoder_ti_frac")
    return problems
