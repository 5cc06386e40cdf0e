"""The judge of a launched script: it records the held losses, and says the same on every process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object

from dvar.stopping.integrations.accelerate import broadcast_object
from dvar.stopping.monitor import StopMonitor, broadcast_verdict
from dvar.stopping.probe import preserve_state

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dvar.stopping.rule import Rule
    from dvar.stopping.trace import Trace
    from dvar.stopping.verdict import Verdict


@dataclass
class HeldLosses:
    """The losses of the held samples that the script computed last, as the probe of a `StopMonitor`.

    Attributes:
        header: The header of the trace.
        losses: One for each held sample; none between two measurements.
    """

    header: Mapping[str, Any]
    losses: Sequence[float] = ()

    def __call__(self) -> Sequence[float]:
        return self.losses

    def measure(self, step: int) -> Mapping[str, Any]:
        """Return what is recorded at a step."""
        return {"eval": self.losses} if len(self.losses) else {}


class LaunchJudge:
    """The rule, the trace and the script's trackers; only the main process records and judges.

    Args:
        rule: The rule.
        path: File of the trace.
        every: Steps between two measurements.
        header: Header of the trace.
        accelerator: The accelerator of the script.
        warn: Called with each warning of the trace.
    """

    def __init__(
        self,
        rule: Rule,
        path: Path,
        every: int,
        header: Mapping[str, Any],
        accelerator: Any,
        warn: Callable[[str], None],
    ) -> None:
        self._probe = HeldLosses(header)
        self._monitor = StopMonitor(rule, self._probe, path, every=every)
        self._accelerator, self._warn = accelerator, warn

    @property
    def trace(self) -> Trace:
        """Everything recorded so far; empty on all processes but the main one."""
        return self._monitor.trace

    def begin(self, step: int) -> Verdict:
        """Open the trace at the first step, or at the one that the script resumes, and return the verdict there."""
        return self._together(lambda: self._monitor.begin(step))

    def judge(self, step: int, losses: Sequence[float], seconds: Mapping[str, float]) -> Verdict:
        """Record the held losses of all processes at a step, and return the verdict.

        Args:
            step: Number of updates.
            losses: One for each held sample.
            seconds: Time since the last record, by what it was spent on.
        """

        def record() -> Verdict:
            self._probe.losses = losses
            try:
                return self._monitor(step, seconds=seconds)
            finally:
                self._probe.losses = ()

        return self._together(record)

    def log(self, step: int, losses: Sequence[float], verdict: Verdict) -> None:
        """Log L_det and the ratio of a step to the script's trackers.

        Args:
            step: Number of updates.
            losses: One for each held sample.
            verdict: The verdict on them.
        """
        scalars = {"dvar/L_det": sum(losses) / len(losses)}
        if "total_var" in verdict.metrics:
            scalars["dvar/ratio"] = verdict.metrics["ratio"]
        with preserve_state([]):  # a tracker may draw
            self._accelerator.log(scalars, step=step)

    def _together(self, judge: Callable[[], Verdict]) -> Verdict:
        with self._catch_warnings():
            if self._accelerator.num_processes == 1:
                return judge()
            return broadcast_verdict(judge, self._accelerator.is_main_process, broadcast_object)

    @contextmanager
    def _catch_warnings(self) -> Iterator[None]:
        """Print warnings as lines of ours: those of the script keep their form."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for warning in caught:
            self._warn(str(warning.message))


@dataclass(frozen=True)
class Measurement:
    """The losses that one process computed on its held samples, or why it could not.

    Attributes:
        losses: One for each held sample of this process.
        error: What went wrong; empty where nothing did.
    """

    losses: tuple[float, ...]
    error: str = ""

    def together(self, accelerator: Any) -> Measurement:
        """Return the measurement of all processes, in the order of the held samples; the same on each of them."""
        if accelerator.num_processes == 1:
            return self
        parts = gather_object([(self.losses, self.error)])
        error = next((error for _, error in parts if error), "")
        losses = zip(*(losses for losses, _ in parts), strict=False)
        return Measurement((), error) if error else Measurement(tuple(loss for row in losses for loss in row))
