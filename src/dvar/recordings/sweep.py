"""Many recordings: what is missing or damaged is made, several at once, each in a process of its own.

The folders of the runs are all there is to a sweep: killed at any moment, the same command goes on, and a run that
failed is a row with its reason.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

from dvar.errors import DvarError, RefusedInput
from dvar.files import write_json
from dvar.recordings.archive import SECONDS, RecordedRun
from dvar.recordings.cost import ALIKE, estimate, expected, seconds_left, time_left
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.recorder import FAILED
from dvar.recordings.score_samples import lacking, scorer_of
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.worker_pool import WorkerTask, side_by_side, slots
from dvar.training.dataset import Concept
from dvar.training.progress import clock

LOG = "record.log"
Tell = Callable[[str], None]
State = Literal["done", "failed", "missing"]


@dataclass(frozen=True)
class RecordingStatus:
    """How one run of a sweep stands; ``reason`` says why it failed, or what is wrong with what was found."""

    recording: RecordingSpec
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.recording.name:<48} {self.state}" + (f"  {self.reason}" if self.reason else "")


def grid(
    base: RecordingSpec, methods: Sequence[str], concepts: Sequence[str], seeds: Sequence[int]
) -> list[RecordingSpec]:
    """Return the recordings of every method, concept and seed, otherwise as ``base``: concept by concept, so that what
    is there at any time covers all methods alike.
    """
    return [
        replace(base, method=method, concept=concept, seed=seed)
        for seed, concept, method in product(seeds, concepts, methods)
    ]


def check(recordings: Sequence[RecordingSpec]) -> None:
    """Refuse at once what would only fail after hours.

    Raises: RefusedInput with everything that is wrong with methods, concepts, pictures and folders; ModelError when a
    judge cannot be had or does not fit.
    """
    problems: list[str] = []
    known: list[Concept] = []
    for recording in recordings:
        try:
            known.append(recording.check())
        except RefusedInput as refused:
            problems += refused.problems
        else:
            problems += [recording.foreign()] if recording.foreign() else []
    if problems:
        raise RefusedInput(dict.fromkeys(problems))
    if recordings:
        scorer_of(recordings[0], known[0])


def standing(recording: RecordingSpec) -> RecordingStatus:
    """Return how a run stands by what its folder holds; one that is damaged is missing, and the reason says so."""
    if not recording.folder.exists():
        return RecordingStatus(recording, "missing")
    lost = ""
    try:
        RecordedRun.open(recording.folder)
    except DvarError as error:
        lost = str(error).splitlines()[0]
    else:
        if missing := lacking(recording):
            lost = f"pictures of {len(missing)} steps are still to be drawn"
    failed = recording.folder / FAILED
    if lost and failed.exists():
        return RecordingStatus(recording, "failed", str(json.loads(failed.read_text(encoding="utf-8"))["reason"]))
    if lost:
        return RecordingStatus(recording, "missing", lost)
    return RecordingStatus(recording, "done")


def described(base: RecordingSpec) -> str:
    """Return in one line what is measured, as every header says it."""
    plan = PROTOCOLS[base.plan]
    cadence = ", ".join(f"{name} every {every}" for name, every in plan.every.items())
    shown = f"{plan.prompts} prompts x {plan.seeds * plan.rounds} seeds of each kind at about {plan.scored} steps"
    drawn = f"{plan.sampling_steps or 'the preset number of'} sampling steps"
    cap = "" if plan.share == 1 else f", trained to {100 * plan.share:.0f} % of the full length"
    return f"preset {base.plan}: {shown}, {drawn}; {cadence}; {base.pairing}{cap}"


def recorded(
    recordings: Sequence[RecordingSpec], tell: Tell, *, workers: int | None = None, only_estimate: bool = False
) -> list[RecordingStatus]:
    """Make what is missing of ``recordings``, telling first what is measured and how long it will take.

    Raises: all that `check` and `estimate` do, before anything is made.
    """
    check(recordings)
    missing = [recording for recording in recordings if standing(recording).state != "done"]
    tell(f"{len(recordings)} runs, {len(missing)} of them to record; {described(recordings[0])}")
    units = estimate(missing)
    for line in expected(missing, units, workers):
        tell(line)
    if only_estimate:
        return [standing(recording) for recording in recordings]
    for root in {Path(recording.records).expanduser() for recording in missing}:
        _keep(root, {run.method: units[run.method] for run in missing if Path(run.records).expanduser() == root})
    return run_sweep(recordings, workers=workers, units=units, tell=tell)


def _keep(root: Path, units: Mapping[str, Mapping[str, float]]) -> None:
    """Leave unit seconds, measured before the machine had other work, with the records that they price.

    Those of a method that is there stay, so that all of its records have one price.
    """
    path = root / SECONDS
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, {**units, **kept})


def run_sweep(
    recordings: Sequence[RecordingSpec],
    *,
    workers: int | None = None,
    units: Mapping[str, Mapping[str, float]] | None = None,
    tell: Tell = lambda line: None,
    every: float = 60,
) -> list[RecordingStatus]:
    """Make what is missing, damaged or failed of ``recordings``; return how all of them stand.

    Each run is a process that writes to `LOG` in its folder.  ``units`` are those of `estimate`, for the time left;
    progress is told when a run ends and every ``every`` seconds.  Interrupted, it asks each run under way to save.
    """
    missing = [recording for recording in recordings if standing(recording).state != "done"]
    if not missing:
        return [standing(recording) for recording in recordings]
    places = slots(workers, missing[0].threads)
    progress = _SweepProgress(missing, units or {}, len(places))
    with closing(side_by_side({recording: _work(recording) for recording in missing}, places, every)) as working:
        for ended, running in working:
            for recording, reason in ended.items():
                if reason:
                    write_json(recording.folder / FAILED, {"reason": reason})
                progress.ended(recording, failed=bool(reason))
                tell(f"{standing(recording)}")
            tell(progress.line(running))
    return [standing(recording) for recording in recordings]


def table(rows: Iterable[RecordingStatus]) -> Iterator[str]:
    """Yield a line for each row that is not done, and the count of each state."""
    rows = list(rows)
    yield from (str(row) for row in rows if row.state != "done")
    counts = {state: sum(row.state == state for row in rows) for state in ("done", "failed", "missing")}
    yield ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "nothing to record"


class _SweepProgress:
    """How far a sweep is, in expected seconds of work, so that long runs count for more."""

    def __init__(
        self, recordings: Sequence[RecordingSpec], units: Mapping[str, Mapping[str, float]], at_once: int
    ) -> None:
        self.units, self.at_once, self.started = units, at_once, time.monotonic()
        self.left = {recording: self._left(recording) for recording in recordings}
        self.in_all, self.over = sum(self.left.values()), 0

    def ended(self, recording: RecordingSpec, failed: bool) -> None:
        if failed:
            self.in_all -= self.left[recording]  # which nobody did
        self.over, self.left[recording] = self.over + 1, 0.0

    def line(self, running: Sequence[RecordingSpec]) -> str:
        self.left |= {recording: self._left(recording) for recording in running}
        left, spent = sum(self.left.values()), time.monotonic() - self.started
        done = self.in_all - left
        share = 100 * done / self.in_all if self.in_all else 100
        soon = time_left(done, self.in_all, spent, self.at_once if self.units else None)
        told = "" if soon is None else f", about {clock(soon)} left"
        return f"{self.over} of {len(self.left)} runs, {share:.0f} % in {clock(spent)}{told}"

    def _left(self, recording: RecordingSpec) -> float:
        return seconds_left(recording, self.units.get(recording.method, ALIKE))


def _work(recording: RecordingSpec) -> WorkerTask:
    told = json.dumps(asdict(recording))
    return WorkerTask("dvar.recordings.recorder", told, recording.folder / LOG, recording.threads)
