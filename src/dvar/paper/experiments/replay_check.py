"""Is reading a record the same as running?  True runs that DVAR ends, beside what was read off for them."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvar.analysis import strategies
from dvar.analysis.strategies import StopResult, Strategy
from dvar.errors import RefusedInput
from dvar.paper.result import ExperimentResult, Provenance, Table, number, title
from dvar.recordings.archive import RecordedRun, RecordingArchive
from dvar.recordings.restore import rerun
from dvar.stopping.trace import Trace
from dvar.training.personalise import interruption

EACH = 2
"""Records of each method that are run again; one, of small records."""
NEAR = 0.1
"""How far minutes may lie apart, as a share."""
COMPARED = ("eval", "train_loss", "grad_norm")


@dataclass(frozen=True)
class Agreement:
    """What was read off a record, and what a true run did.

    ``differing`` are the fields of the trace that are not equal to the last bit.  ``seconds`` are those that the true
    run spent on updates and evaluations; ``expected`` the counts that were read times median unit seconds, measured
    on a twin between the true run's steps; ``spread`` the same by their 10th and 90th percentile.
    """

    record: RecordedRun
    read: StopResult
    ran: int
    differing: tuple[str, ...]
    seconds: float
    expected: float
    spread: tuple[float, float]

    @property
    def equal(self) -> bool:
        """Whether the run was the one that was read, step for step."""
        return self.ran == self.read.stop and not self.differing

    @property
    def near(self) -> bool:
        """Whether the minutes agree."""
        return abs(self.seconds / self.expected - 1) <= NEAR


def make(shelf: RecordingArchive) -> ExperimentResult:
    """Some true runs of every method."""
    chosen = [one for method in shelf.methods for one in _chosen(shelf, method)]
    if not chosen:
        raise RefusedInput(["DVAR stops no recorded run that has a folder of its own: record some, or longer ones"])
    found = [agreement(record, way) for record, way in chosen]
    equal, near = (sum(getattr(one, name) for one in found) for name in ("equal", "near"))
    said = (
        f"{equal} of {len(found)} true runs stopped at the step that was read off the record, with every loss and "
        f"gradient norm on the way equal to the last bit; in {near} of {len(found)} the seconds agree "
        f"within {100 * NEAR:.0f} %."
    )
    return ExperimentResult("agreement", "Reading and running", (said,), (_table(found),))


def agreement(record: RecordedRun, way: Strategy) -> Agreement:
    """Run what ``way`` says of ``record`` in truth, in a folder that is thrown away, and compare.

    Raises: RefusedInput when the record has no folder; KeyboardInterrupt when asked to stop.
    """
    if record.folder is None:
        raise RefusedInput([f"{record.name} was read from a file of traces: to run it again, name a folder of records"])
    threads, units = torch.get_num_threads(), dict[str, list[float]](train=[], forward=[])
    torch.set_num_threads(record.threads)
    try:
        with tempfile.TemporaryDirectory() as elsewhere, interruption() as interrupted:
            job, twin = (rerun(record.folder, Path(elsewhere) / name) for name in ("run", "twin"))
            job.criterion = way.rule
            job.open(None)
            for step in job.steps(lambda: False):
                if interrupted():
                    raise KeyboardInterrupt
                if step.eval is not None:
                    _timed(units["forward"], twin.probe, len(step.eval))
                _timed(units["train"], lambda at=step.step: twin.learner.update(twin.training_losses, at + 1))
    finally:
        torch.set_num_threads(threads)
    ran, read = job.learner.trace, strategies.read(way, record)
    low, middle, high = (
        60 * strategies.minutes(read, {name: float(np.percentile(spent, share)) for name, spent in units.items()})
        for share in (10, 50, 90)
    )
    seconds = sum(row["seconds"][part] for row in ran.records for part in ("train", "probe"))
    return Agreement(record, read, ran.last_step, _differing(record.trace, ran), seconds, middle, (low, high))


def _chosen(shelf: RecordingArchive, method: str) -> list[tuple[RecordedRun, Strategy]]:
    """The first concepts by name that DVAR stops on."""
    found = []
    for record in shelf.examples(method, len(shelf)):
        way = strategies.paper_dvar(record, scaled=True)
        if record.folder is not None and not strategies.read(way, record).censored:
            found.append((record, way))
    return found[: EACH if all(record.header.get("share", 1) == 1 for record, _ in found) else 1]


def _timed(spent: list[float], work: Any, share: int = 1) -> None:
    started = time.perf_counter()
    work()
    spent.append((time.perf_counter() - started) / share)


def _differing(recorded: Trace, ran: Trace) -> tuple[str, ...]:
    rows = {row["step"]: row for row in recorded.records}
    pairs = [(row, rows[row["step"]]) for row in ran.records]
    return tuple(
        name for name in COMPARED if any(_plain(now.get(name)) != _plain(then.get(name)) for now, then in pairs)
    )


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _table(found: list[Agreement]) -> Table:
    lines, data = [], []
    for one in found:
        low, high = one.spread
        lines.append(
            (
                f"{title(one.record.method)}, {one.record.concept.replace('_', ' ')}",
                f"{one.read.stop}",
                f"{one.ran}",
                "equal" if not one.differing else f"differ: {', '.join(one.differing)}",
                number(one.expected, 1),
                f"{number(low, 1)} … {number(high, 1)}",
                number(one.seconds, 1),
                f"{100 * (one.seconds / one.expected - 1):+.0f} %".replace("-", "−"),
            )
        )
        data.append(
            {
                "record": one.record.name,
                "read": one.read.stop,
                "ran": one.ran,
                "differing": one.differing,
                "seconds read": one.expected,
                "low": low,
                "high": high,
                "seconds ran": one.seconds,
            }
        )
    columns = (
        "True run",
        "Stop read",
        "Stop run",
        "Losses and gradients",
        "Seconds read",
        "10–90 %",
        "Seconds run",
        "Apart",
    )
    caption = (
        "DVAR by the paper's preset, scaled in time. Seconds are of updates and evaluations, without start-up; those "
        "read are counts times median unit seconds, which a twin of the run measured between its steps, so that both "
        f"see the same machine; beside them the same by the units' percentiles. "
        f"{Provenance.of([one.record for one in found])}"
    )
    return Table("runs", caption, columns, tuple(lines), tuple(data))
