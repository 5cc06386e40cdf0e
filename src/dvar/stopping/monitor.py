"""The stop monitor: a probe, a rule and the trace between them, for any training loop."""

from __future__ import annotations

import itertools
import operator
import os
import shutil
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from numpy.typing import ArrayLike

from dvar.errors import DvarError, RefusedInput, TraceError
from dvar.stopping.gloo_exit import wait_for_gloo_at_exit
from dvar.stopping.rule import Rule, is_whole_number
from dvar.stopping.rules import schedule_problems
from dvar.stopping.trace import Trace, TraceFile
from dvar.stopping.verdict import Verdict


@runtime_checkable
class StepProbe(Protocol):
    """A probe whose measurement depends on the step, such as `PairedProbe`."""

    def measure(self, step: int) -> Mapping[str, Any]: ...


class StopMonitor:
    """A monitor that a training loop calls after each update: it measures, records, saves and judges.

    ``monitor(step)`` returns the `Verdict` of the rule at the newest record. ``step`` is the number of updates made so
    far in the whole run, 0 for the untouched model. At every ``every``-th step, or the first call after it, ``probe()``
    is called and its losses are recorded. Between two of these steps the last verdict is returned again, also when the
    same step is passed twice (a loop may call after each part of an accumulated batch) and at any step after a stop.
    Without a probe the rule reads the metrics of the call: ``monitor(step, val_loss=0.1)`` with ``Dvar(310, 0.15,
    metric="val_loss")``.

    Every record is in the file ``path`` before it is judged, and a run is resumed from that file, whatever the loop
    saves of its own: the first call, or `begin`, continues from the records up to its step. If there are later ones, of
    updates that were lost with a process, a copy of the file is kept beside it as ``path``.cut-N. At step 0, where a
    new run begins, an older file is moved there. Nothing is opened before the first call, so a process that never
    calls touches no file. The attributes ``trace`` and ``verdict`` can be read at any time.

    Args:
        rule: The rule that judges.
        probe: Returns the losses on the held batch; None to judge the metrics of the calls.
        path: The file of the trace, such as run/trace.jsonl.
        every: Steps from one measurement to the next, at least 1.

    Raises:
        RefusedInput: ``every`` is not a whole number of at least 1, ``rule`` or ``probe`` cannot be called, or a window
            of the rule would hold too few evaluations.
        TraceError: On a call: the step goes backwards, or the file is no trace or has other held timesteps.
    """

    def __init__(
        self,
        rule: Rule,
        probe: Callable[[], ArrayLike] | StepProbe | None,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
    ) -> None:
        problems = []
        if not callable(rule) or isinstance(rule, type):
            problems.append(f"rule must be a rule, which is called on a trace, got {rule!r}: pass Dvar(310, 0.15)")
        if probe is not None and not callable(probe):
            problems.append(f"probe must be a function that returns losses, or a Probe, got {probe!r}: see dvar.Probe")
        if not is_whole_number(every) or every < 1:
            problems.append(f"every must be a whole number of steps, 1 or more, got {every!r}: 1 measures at each step")
        elif probe is not None:
            problems += [
                problem for window in _iter_windows(rule) for problem in schedule_problems(window, every, sys.maxsize)
            ]
        if problems:
            raise RefusedInput(problems)
        self.rule, self.probe, self.path, self.every = rule, probe, Path(path), every
        self.trace = Trace()
        self.verdict = rule(self.trace)
        self._file: TraceFile | None = None
        self._last_call = self._last_due = 0

    def begin(self, step: int) -> Verdict:
        """Open the trace at ``step``, the first of a run or the one it is resumed at, and return the verdict there.

        A loop that can return to a checkpoint calls this each time it does; in other loops the first call is enough.
        """
        self._open(_validate_step(step))
        return self(step)

    def __call__(self, step: int, **metrics: Any) -> Verdict:
        step = _validate_step(step)
        if self._file is None:
            self._open(step)
        if step < self._last_call:
            raise TraceError(
                f"a monitor is called at growing steps, got {step} after {self._last_call}: count the updates of the "
                f"whole run, and after returning to a checkpoint call begin({step}) first"
            )
        self._last_call = step
        repeated = len(self.trace) and step == self.trace.last_step
        if self.verdict.stop or (repeated and not metrics):
            return self.verdict
        if values := {**(self._measure(step) if self._is_due(step) else {}), **metrics}:
            record = self.trace.record(step, **values)
            if self._file is not None:
                self._file.append(record)
            self.verdict = self.rule(self.trace)
        return self.verdict

    def _is_due(self, step: int) -> bool:
        """Return whether a multiple of ``every`` has been reached or passed: a loop may count by more than one."""
        return step % self.every == 0 or step // self.every > self._last_due // self.every

    def _measure(self, step: int) -> Mapping[str, Any]:
        self._last_due = step
        if self.probe is None:
            return {}
        return self.probe.measure(step) if isinstance(self.probe, StepProbe) else {"eval": self.probe()}

    def _open(self, step: int) -> None:
        if self._file is not None:
            self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._set_aside(step)
        elif step > self.every:
            warnings.warn(
                f"a run is resumed at step {step} and {self.path} does not exist, so the rule cannot use the steps "
                "before: put the trace of that run there",
                stacklevel=3,
            )
        self._file = TraceFile(self.path, getattr(self.probe, "header", None))
        weakref.finalize(self, self._file.close)
        self.trace = Trace.read(self.path)
        self.verdict, self._last_call, self._last_due = self.rule(self.trace), step, step

    def _set_aside(self, step: int) -> None:
        """Keep a copy of the file beside it, then cut it to ``step``; at step 0 it is of another run and is moved."""
        if step and Trace.read(self.path).last_step <= step:
            return
        suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
        paths = (self.path.with_name(f"{self.path.name}.cut-{step}{suffix}") for suffix in suffixes)
        copy = next(path for path in paths if not path.exists())
        if step:
            shutil.copyfile(self.path, copy)
            Trace.read(self.path).cut(step).write(self.path)
        else:
            self.path.rename(copy)
            warnings.warn(f"a run begins and {self.path} already exists: it is moved to {copy.name}", stacklevel=4)


def broadcast_verdict(judge: Callable[[], Verdict], first: bool, broadcast: Callable[[Any], Any]) -> Verdict:
    """Return on every rank the verdict that ``judge`` gives on the first, so that all stop at the same step.

    If ``judge`` fails, every rank fails, because the others would otherwise wait for ever.

    Args:
        judge: Called on the first rank only.
        first: Whether this is the first rank.
        broadcast: Called on every rank; returns on each the value (plain JSON) that the first rank passed.

    Raises:
        DvarError: On the other ranks, with the message of what ``judge`` raised on the first.
    """
    wait_for_gloo_at_exit()
    if not first:
        message = broadcast(None)
        if "error" in message:
            raise DvarError(f"the first rank could not judge: {message['error']}")
        return Verdict.from_json(message)
    try:
        verdict = judge()
    except Exception as error:
        broadcast({"error": f"{type(error).__name__}: {error}"})
        raise
    # Diagnoses take time to compute, and nobody reads those of a verdict that goes on.
    broadcast((verdict if verdict.stop else replace(verdict, diagnose=tuple)).to_json())
    return verdict


def _validate_step(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError:
        raise TraceError(f"a step is a whole number of updates, got {step!r}: pass how many were made") from None


def _iter_windows(rule: object) -> Iterator[int]:
    """Yield the windows of a rule and of the rules that it combines."""
    if isinstance(window := getattr(rule, "window", None), int):
        yield window
    for part in (*getattr(rule, "rules", ()), *([inner] if (inner := getattr(rule, "rule", None)) else [])):
        yield from _iter_windows(part)
