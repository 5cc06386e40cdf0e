"""Optuna: a rule that reads what a trial reports."""

from __future__ import annotations

from dvar.stopping.rules import Rule
from dvar.stopping.trace import Trace

try:
    from optuna import Study
    from optuna.pruners import BasePruner
    from optuna.trial import FrozenTrial
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[optuna]'", name=error.name) from None


class DvarPruner(BasePruner):
    """Makes `trial.should_prune()` true once `rule` stops on what `trial.report(loss, step)` has told.

    A trial that then breaks its loop and returns its value is complete.  One that raises `TrialPruned` is recorded as
    pruned, which says that it was hopeless: a stopped one is not.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        return self._rule(trace_of(trial)).stop


def trace_of(trial: FrozenTrial) -> Trace:
    """What a trial has reported, as a trace: `rule(trace_of(study.trials[0]))` says why the first one stopped.

    The study's storage is where it survives; Optuna itself keeps the first of two reports of one step.

    Raises: TraceError when a step is negative.
    """
    trace = Trace()
    for step, value in sorted(trial.intermediate_values.items()):
        trace.record(step, value)
    return trace
