"""A probe, a rule and the trace between them, kept in a file: the few lines that every training loop needs alike."""

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
from dvar.stopping.rule import Rule, whole
from dvar.stopping.rules import schedule_problems
from dvar.stopping.trace import Trace, TraceFile
from dvar.stopping.verdict import Verdict


@runtime_checkable
class MeasuresStep(Protocol):
    """A probe whose reading depends on the step, as `PairedProbe` is one."""

    def measure(self, step: int) -> Mapping[str, Any]: ...


class StopMonitor:
    """What a loop asks after each update: measure if it is time, record, write it down, judge.

    `watch(step)` returns the `Verdict` of `rule` at the newest record.  `step` is the number of updates made so far in
    the whole run, 0 for the untouched model.  At every `every`-th step `probe()` is called and its losses are recorded.
    Between two of them the verdict of the last one comes again; so it does when the same step is asked for twice (a
    host may ask after each part of an accumulated batch) and, at any step, after a stop.  Without a probe the rule
    reads what the call itself brings: `watch(step, val_loss=0.1)` and `Dvar(310, 0.15, metric="val_loss")`.

    Every record is in the file `path` before it is judged, and that file is how a run is resumed, whatever the host
    keeps of its own: the first call, or `begin`, goes on from the records up to its step.  If there are later ones,
    of updates that were lost with a process, the file as it was is kept beside it as `path`.cut-N; so it is at step 0,
    where another run begins.  Nothing is opened before that, so a process that is never asked touches no file.

    `trace` and `verdict` may be read at any time.

    Raises: RefusedInput when `every` is not a whole number of at least 1, `rule` or `probe` cannot be called, or a
    window of the rule would hold too few evaluations; on a call TraceError when the step goes backwards, the file is no
    trace or was made with other held timesteps, and all that probe and rule raise.
    """

    def __init__(
        self,
        rule: Rule,
        probe: Callable[[], ArrayLike] | MeasuresStep | None,
        path: str | os.PathLike[str],
        *,
        every: int = 1,
    ) -> None:
        problems = []
        if not callable(rule) or isinstance(rule, type):
            problems.append(f"rule must be a rule, which is called on a trace, got {rule!r}: pass Dvar(310, 0.15)")
        if probe is not None and not callable(probe):
            problems.append(f"probe must be a function that returns losses, or a Probe, got {probe!r}: see dvar.Probe")
        if not whole(every) or every < 1:
            problems.append(f"every must be a whole number of steps, 1 or more, got {every!r}: 1 measures at each step")
        elif probe is not None:
            problems += [told for window in _windows(rule) for told in schedule_problems(window, every, sys.maxsize)]
        if problems:
            raise RefusedInput(problems)
        self.rule, self.probe, self.path, self.every = rule, probe, Path(path), every
        self.trace = Trace()
        self.verdict = rule(self.trace)
        self._file: TraceFile | None = None
        self._asked = 0

    def begin(self, step: int) -> Verdict:
        """Open the trace at `step`, the first of a run or the one it is resumed at, and return the verdict there.

        A host that can go back to a checkpoint calls it each time; in other loops the first call does.
        """
        self._open(_update_number(step))
        return self(step)

    def __call__(self, step: int, **metrics: Any) -> Verdict:
        step = _update_number(step)
        if self._file is None:
            self._open(step)
        if step < self._asked:
            raise TraceError(
                f"a watch is asked at growing steps, got {step} after {self._asked}: count the updates of the whole "
                f"run, and after going back to a checkpoint call begin({step}) first"
            )
        self._asked = step
        again = len(self.trace) and step == self.trace.last_step
        if self.verdict.stop or (again and not metrics):
            return self.verdict
        if found := {**(self._measured(step) if step % self.every == 0 else {}), **metrics}:
            record = self.trace.record(step, **found)
            if self._file is not None:
                self._file.append(record)
            self.verdict = self.rule(self.trace)
        return self.verdict

    def _measured(self, step: int) -> Mapping[str, Any]:
        if self.probe is None:
            return {}
        return self.probe.measure(step) if isinstance(self.probe, MeasuresStep) else {"eval": self.probe()}

    def _open(self, step: int) -> None:
        if self._file is not None:
            self._file.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._set_aside(step)
        elif step > self.every:
            warnings.warn(
                f"a run goes on at step {step} and {self.path} does not exist, so the rule knows nothing of the steps "
                "before: put the trace of that run there",
                stacklevel=3,
            )
        self._file = TraceFile(self.path, getattr(self.probe, "header", None))
        weakref.finalize(self, self._file.close)
        self.trace = Trace.read(self.path)
        self.verdict, self._asked = self.rule(self.trace), step

    def _set_aside(self, step: int) -> None:
        """Keep the file as it is beside it, then cut it to `step`; at step 0 it is another run's, and goes whole."""
        if step and Trace.read(self.path).last_step <= step:
            return
        numbers = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
        names = (self.path.with_name(f"{self.path.name}.cut-{step}{number}") for number in numbers)
        kept = next(name for name in names if not name.exists())
        if step:
            shutil.copyfile(self.path, kept)
            Trace.read(self.path).cut(step).write(self.path)
        else:
            self.path.rename(kept)
            warnings.warn(f"a run begins and {self.path} was there: that run's is now {kept.name}", stacklevel=4)


def from_first_rank(judge: Callable[[], Verdict], first: bool, broadcast: Callable[[Any], Any]) -> Verdict:
    """The verdict that `judge` gives on the first rank, on every rank: all of them stop at the same step or none does.

    `first` says whether this is that rank; only there is `judge` called.  `broadcast(value)` is the host's: every rank
    calls it, and it returns on each what the first one gave (plain JSON).  Where the judging fails it fails on every
    rank, since the others would otherwise wait for ever.

    Raises: what `judge` raises, on the first rank; DvarError with its message, on the others.
    """
    if not first:
        heard = broadcast(None)
        if "error" in heard:
            raise DvarError(f"the first rank could not judge: {heard['error']}")
        return Verdict.from_json(heard)
    try:
        verdict = judge()
    except Exception as error:
        broadcast({"error": f"{type(error).__name__}: {error}"})
        raise
    # Diagnoses take time to find, and nobody reads those of a verdict that goes on.
    broadcast((verdict if verdict.stop else replace(verdict, diagnose=tuple)).to_json())
    return verdict


def _update_number(step: Any) -> int:
    try:
        return operator.index(step)
    except TypeError:
        raise TraceError(f"a step is a whole number of updates, got {step!r}: pass how many were made") from None


def _windows(rule: object) -> Iterator[int]:
    """The windows of a rule and of those it is made of."""
    if isinstance(window := getattr(rule, "window", None), int):
        yield window
    for part in (*getattr(rule, "rules", ()), *([inner] if (inner := getattr(rule, "rule", None)) else [])):
        yield from _windows(part)
