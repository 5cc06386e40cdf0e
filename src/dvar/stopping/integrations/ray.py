"""Integration with Ray Tune: a stopper that judges each trial by a metric that it reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.rules import Rule
from dvar.stopping.trace import Trace

try:
    from ray.tune import Stopper
except ModuleNotFoundError as error:
    raise ImportError(f"{__name__} needs {error.name}: pip install 'dvar[ray]'", name=error.name) from None


class DvarStopper(Stopper):  # type: ignore[misc]  # untyped base
    """A stopper that judges each trial by its own trace of ``metric``, the loss on its fixed batch.

    The attribute ``traces`` holds the traces by trial: ``rule(stopper.traces[trial_id])`` says why one stopped. Ray
    saves the stopper with the experiment. A trial that returns to a checkpoint reports some steps again; these replace
    what it reported before.

    Args:
        rule: The rule that judges; it reads the metric as the loss.
        metric: Name of the loss in a result.
        step: Name of the number of updates in a result; Ray's own "training_iteration" counts the reports.

    Raises:
        RefusedInput: On a call: a result lacks ``metric`` or ``step``.
        TraceError: On a call: one of them is not a number that can be recorded.
    """

    def __init__(self, rule: Rule, metric: str, step: str = "training_iteration") -> None:
        self._rule, self._metric, self._step = rule, metric, step
        self.traces: dict[str, Trace] = {}

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        if result.get("done") and self._metric not in result:
            return False  # how Ray reports a trial that ended without a result
        missing = [name for name in (self._step, self._metric) if name not in result]
        if missing:
            raise RefusedInput(
                f"trial {trial_id} reports no {name!r}: report it, or name another of {', '.join(map(str, result))}"
                for name in missing
            )
        trace = self.traces.setdefault(trial_id, Trace())
        if len(trace) and result[self._step] <= trace.last_step:
            trace = self.traces[trial_id] = trace.cut(result[self._step] - 1)
        trace.record(result[self._step], result[self._metric])
        return self._rule(trace).stop

    def stop_all(self) -> bool:
        """Return False: a verdict on one trial does not end the others."""
        return False
