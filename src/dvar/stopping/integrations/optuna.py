"""Integration with Optuna: a pruner that judges what a trial reports."""

from __future__ import annotations

from dvar.stopping.rules import Rule
from dvar.stopping.trace import Trace

try:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[optuna]'", name=error.name) from None


class DvarPruner(BasePruner):  # type: ignore[misc]  # untyped base
    """A pruner for which ``trial.should_prune()`` is true once the rule stops on the losses that the trial reported.

    A trial that then leaves its loop and returns its value is complete. One that raises `TrialPruned` is recorded as
    pruned, that is as hopeless, which a stopped one is not.

    Args:
        rule: The rule that judges.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return self._rule(build_trace(trial)).stop


def build_trace(trial: FrozenTrial) -> Trace:
    """Return the reports of a trial as a trace: ``rule(build_trace(study.trials[0]))`` is the verdict on the first one.

    The reports are in the study's storage; Optuna keeps the first of two reports of one step.

    Raises:
        TraceError: A step is negative.
    """
    trace = Trace()
    for step, value in sorted(trial.intermediate_values.items()):
        trace.record(step, value)
    return trace
