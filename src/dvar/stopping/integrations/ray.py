"""Ray Tune: a stopper that judges each trial by a number which it reports."""

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


class DvarStopper(Stopper):
    """Stops each trial by its own trace of `metric`, the loss on its fixed batch; `rule` reads it as the loss.

    `step` names what counts the updates; Ray's own "training_iteration" counts the reports.  `traces` holds the traces
    by trial: `rule(stopper.traces[trial_id])` says why one stopped.  Ray keeps the stopper with the experiment, and a
    trial that is set back to a checkpoint reports some steps again; these replace what it reported before.

    Raises: RefusedInput when a result lacks `metric` or `step`, TraceError when they are not numbers to be recorded.
    """

    def __init__(self, rule: Rule, metric: str, step: str = "training_iteration") -> None:
        self._rule, self._metric, self._step = rule, metric, step
        self.traces: dict[str, Trace] = {}

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        if result.get("done") and self._metric not in result:
            return False  # how Ray tells of a trial that ended without a report
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
        """No verdict on one trial ends the others."""
        return False
