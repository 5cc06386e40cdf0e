"""The replay check: runs that DVAR really ends, compared with the stops that were read from recorded runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvar.analysis import strategies
from dvar.analysis.strategies import StopResult, Strategy
from dvar.diffusion.devices import float32_arithmetic
from dvar.errors import RefusedInput
from dvar.html.tables import Column
from dvar.paper.result import ExperimentResult, Provenance, Table, build_table, format_number, method_title
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.restore import prepare_rerun
from dvar.stopping.trace import Trace
from dvar.training.personalise import interruption

EACH = 2
"""Recorded runs of each method that are run again; one of small recordings."""
NEAR = 0.1
"""How far seconds may differ, as a share."""
COMPARED = ("eval", "train_loss", "grad_norm")


@dataclass(frozen=True)
class ReplayCheck:
    """The stop that was read from a recorded run, and the stop of a real run.

    Args:
        run: The recorded run.
        read: The stop that was read from it.
        stop: The step at which the real run stopped.
        differing: Metrics of the trace that are not equal to the last bit.
        seconds: Seconds that the real run spent on updates and evaluations.
        expected: Counts that were read times median unit seconds, measured on a twin between the real run's steps.
        spread: The same with the 10th and the 90th percentile of the unit seconds.
    """

    run: RecordedRun
    read: StopResult
    stop: int
    differing: tuple[str, ...]
    seconds: float
    expected: float
    spread: tuple[float, float]

    @property
    def equal(self) -> bool:
        """Whether the real run equals the recorded one, step for step."""
        return self.stop == self.read.stop and not self.differing

    @property
    def near(self) -> bool:
        """Whether the seconds agree within `NEAR`."""
        return abs(self.seconds / self.expected - 1) <= NEAR

    @property
    def data(self) -> dict[str, Any]:
        """Return the numbers by name."""
        return {
            "record": self.run.name,
            "read": self.read.stop,
            "ran": self.stop,
            "differing": self.differing,
            "seconds read": self.expected,
            "low": self.spread[0],
            "high": self.spread[1],
            "seconds ran": self.seconds,
        }


_SECONDS = partial(format_number, digits=1)
COLUMNS = (
    Column[ReplayCheck]("Run", lambda row: f"{method_title(row.run.method)}, {row.run.concept.replace('_', ' ')}"),
    Column[ReplayCheck]("Stop read", lambda row: row.read.stop),
    Column[ReplayCheck]("Stop of the run", "stop"),
    Column[ReplayCheck](
        "Losses and gradients", lambda row: f"differ: {', '.join(row.differing)}" if row.differing else "equal"
    ),
    Column[ReplayCheck]("Seconds read", "expected", _SECONDS),
    Column[ReplayCheck]("10–90 %", "spread", lambda spread: " … ".join(map(_SECONDS, spread))),
    Column[ReplayCheck]("Seconds of the run", "seconds", _SECONDS),
    Column[ReplayCheck](
        "Difference",
        lambda row: row.seconds / row.expected - 1,
        lambda share: f"{100 * share:+.0f} %".replace("-", "−"),
    ),
)


def compare_replay_with_runs(archive: RecordingArchive) -> ExperimentResult:
    """Run some recorded runs of every method again and compare."""
    chosen = [pair for method in archive.methods for pair in _choose_runs(archive, method)]
    if not chosen:
        raise RefusedInput(["DVAR stops no recorded run that has a folder of its own: record some, or longer ones"])
    checks = [check_replay(run, strategy) for run, strategy in chosen]
    equal, near = sum(check.equal for check in checks), sum(check.near for check in checks)
    finding = (
        f"{equal} of {len(checks)} runs stopped at the step that was read from the recorded run, with every loss and "
        f"gradient norm before it equal to the last bit; in {near} of {len(checks)} the seconds agree "
        f"within {100 * NEAR:.0f} %."
    )
    return ExperimentResult((finding,), (_table_of_checks(checks),))


def check_replay(run: RecordedRun, strategy: Strategy) -> ReplayCheck:
    """Run ``strategy`` for real on the settings of a recorded run, in a temporary folder, and compare.

    Raises:
        RefusedInput: The recorded run has no folder.
        KeyboardInterrupt: The user asked to stop.
    """
    if run.folder is None:
        raise RefusedInput(
            [f"{run.name} was read from a file of traces: to run it again, name a folder of recorded runs"]
        )
    threads, units = torch.get_num_threads(), dict[str, list[float]](train=[], forward=[])
    torch.set_num_threads(run.threads)
    try:
        with tempfile.TemporaryDirectory() as folder, interruption() as interrupted:
            real, twin = (prepare_rerun(run.folder, Path(folder) / name) for name in ("run", "twin"))
            real.rule = strategy.rule
            with float32_arithmetic(real.config.allow_tf32):  # as the run was recorded
                real.open(None)
                for step in real.steps(lambda: False):
                    if interrupted():
                        raise KeyboardInterrupt
                    if step.eval is not None:
                        units["forward"].append(_time(twin.probe) / len(step.eval))
                    units["train"].append(_time(partial(twin.learner.update, twin.training_losses, step.step + 1)))
    finally:
        torch.set_num_threads(threads)
    trace, read = real.learner.trace, strategies.evaluate_strategy(strategy, run)
    low, expected, high = (
        60
        * strategies.estimate_minutes(read, {name: float(np.percentile(spent, share)) for name, spent in units.items()})
        for share in (10, 50, 90)
    )
    seconds = sum(record["seconds"][part] for record in trace.records for part in ("train", "probe"))
    differing = _differing_metrics(run.trace, trace)
    return ReplayCheck(run, read, trace.last_step, differing, seconds, expected, (low, high))


def _choose_runs(archive: RecordingArchive, method: str) -> list[tuple[RecordedRun, Strategy]]:
    """Return the first concepts by name that DVAR stops on."""
    chosen = []
    for run in archive.example_runs(method, len(archive)):
        strategy = strategies.paper_dvar_strategy(run, scaled=True)
        if run.folder is not None and not strategies.evaluate_strategy(strategy, run).censored:
            chosen.append((run, strategy))
    return chosen[: EACH if all(run.header.get("share", 1) == 1 for run, _ in chosen) else 1]


def _time(work: Callable[[], object]) -> float:
    """Return the seconds that ``work`` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _differing_metrics(recorded: Trace, real: Trace) -> tuple[str, ...]:
    by_step = {record["step"]: record for record in recorded.records}
    pairs = [(record, by_step[record["step"]]) for record in real.records]
    return tuple(
        name
        for name in COMPARED
        if any(_to_list(record.get(name)) != _to_list(other.get(name)) for record, other in pairs)
    )


def _to_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _table_of_checks(checks: Sequence[ReplayCheck]) -> Table:
    caption = (
        "DVAR with the paper's preset, scaled in time. Seconds are those of updates and evaluations, without start-up. "
        "Seconds read are counts times median unit seconds, which a twin of the run measured between its steps, so "
        "that both see the same machine; next to them the same with the 10th and the 90th percentile of the units. "
        f"{Provenance.of([check.run for check in checks])}"
    )
    return build_table("runs", caption, COLUMNS, checks, data=[check.data for check in checks])
