"""The stopping rule of a run."""

from __future__ import annotations

from collections.abc import Iterator

from dvar.config.fields import invalid_fields
from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput
from dvar.stopping.octave import MIN_OCTAVE_RECORDS
from dvar.stopping.rule import build_rule
from dvar.stopping.rules import MIN_RECORDS, AnyOf, FixedSteps, Rule, schedule_problems

_FIELDS = {
    *("rule", "window", "threshold", "probe_every", "probes_per_octave"),
    *("max_train_steps", "train_text_encoder_ti_frac"),
}


def condition_of(rule: str, window: int, threshold: float) -> Rule:
    """Return the rule of this name, with what it takes of these settings.

    Raises:
        RefusedInput: There is no such rule, or it refuses a setting.
    """
    return build_rule(rule, {"window": window, "threshold": threshold})


def rule_of(config: TrainingConfig) -> Rule:
    """Return what ends a run: its rule or the cap, whichever comes first."""
    return AnyOf((condition_of(config.rule, config.window, config.threshold), FixedSteps(config.max_train_steps)))


def problems(config: TrainingConfig) -> list[str]:
    """Return what keeps the rule of ``config`` from being one, or from ever stopping the run."""
    if not _FIELDS.isdisjoint(name for name, _ in invalid_fields(config)):
        return []
    problems: list[str] = []
    try:
        condition_of(config.rule, config.window, config.threshold)
    except RefusedInput as error:
        problems += error.problems
    if config.rule == "octave":
        return [*problems, *_octave_problems(config)]
    if config.probes_per_octave is not None:
        problems.append(
            f"probes_per_octave is for the rule octave, got {config.probes_per_octave} with {config.rule}: drop it"
        )
    elif config.window >= MIN_RECORDS:
        problems += schedule_problems(config.window, config.probe_every, config.max_train_steps)
    after_pivot = config.max_train_steps - config.pivot_step
    if after_pivot <= config.window < config.max_train_steps:
        message = f"window must be smaller than the steps with a frozen word, got window {config.window}"
        problems.append(f"{message} and {after_pivot} steps: shorten it, or lower train_text_encoder_ti_frac")
    return problems


def _octave_problems(config: TrainingConfig) -> Iterator[str]:
    """Yield why the rule octave could never end the run."""
    steps = config.max_train_steps - config.pivot_step
    if steps <= config.earliest_stop:
        judged = "steps with a frozen word" if config.pivot_step else "max_train_steps"
        message = f"the rule octave stops after {config.earliest_stop} steps at the earliest, got {judged} {steps}"
        yield f"{message}: raise max_train_steps, or use the rule dvar"
    elif config.probes_per_octave is None and steps // 2 < MIN_OCTAVE_RECORDS * config.probe_every:
        most = max(1, steps // 2 // MIN_OCTAVE_RECORDS)
        message = f"the rule octave needs {MIN_OCTAVE_RECORDS} evaluations in the second half of {steps} steps"
        yield f"{message}, got probe_every {config.probe_every}: evaluate every {most} or more often"
