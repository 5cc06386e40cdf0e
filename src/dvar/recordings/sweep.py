"""Sweeps: many recordings, several at once, each in a process of its own."""

# The folders of the runs are the only state of a sweep: killed at any moment, the same command goes on, and a run that
# failed is a status with its reason.

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dvar.cluster.places import Places
from dvar.cluster.pool import interrupting_signals
from dvar.cluster.task import ENDS, WorkerTask
from dvar.errors import DvarError, FolderInUse, RefusedInput
from dvar.files import write_json
from dvar.locks import lock_folder
from dvar.recordings.cost import (
    ROUGH_UNITS,
    UnitSeconds,
    estimate_seconds_left,
    extrapolate_seconds_left,
    format_estimate,
    measure_methods,
)
from dvar.recordings.pools import start_pool
from dvar.recordings.protocol import PROTOCOLS
from dvar.recordings.recorded_run import FAILED, SECONDS, RecordedRun, read_failure, read_recorded_json
from dvar.recordings.score_samples import find_missing_rounds, load_scorer
from dvar.recordings.spec import RecordingSpec
from dvar.stopping.cadence import format_cadence
from dvar.training.dataset import Concept
from dvar.training.preflight import launcher_problems
from dvar.training.progress import format_duration

LOG = "record.log"
Notify = Callable[[str], None]
State = Literal["done", "failed", "missing"]


@dataclass(frozen=True)
class RecordingStatus:
    """The state of one recording of a sweep.

    Attributes:
        reason: Why it failed, or what is wrong with the files in its folder.
    """

    recording: RecordingSpec
    state: State
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.recording.name:<48} {self.state}" + (f"  {self.reason}" if self.reason else "")


def validate_recordings(specs: Sequence[RecordingSpec], places: Places | None = None) -> None:
    """Refuse at once what would otherwise fail after hours.

    Args:
        places: Where they are to be made; by default on this machine.

    Raises:
        RefusedInput: Methods, concepts, images, folders or a cluster cannot be used; every problem is named.
        ModelError: A judge cannot be loaded or does not fit.
    """
    problems = launcher_problems(os.environ, "dvar record")
    concepts: list[Concept] = []
    for spec in specs:
        try:
            concepts.append(spec.validate())
        except RefusedInput as refused:
            problems += refused.problems
        else:
            problems += [conflict] if (conflict := spec.find_conflict()) else []
    if places and specs:
        problems += places.problems(Path(specs[0].records).expanduser())
    if problems:
        raise RefusedInput(dict.fromkeys(problems))
    if specs:
        load_scorer(specs[0], concepts[0])


def read_status(spec: RecordingSpec) -> RecordingStatus:
    """Return the state of a recording by the files in its folder; a damaged one is missing, with the reason."""
    if not spec.folder.exists():
        return RecordingStatus(spec, "missing")
    problem = ""
    try:
        RecordedRun.open(spec.folder)
    except DvarError as error:
        problem = str(error).splitlines()[0]
    else:
        if missing := find_missing_rounds(spec):
            problem = f"images of {len(missing)} steps are still to be generated"
    if problem and (spec.folder / FAILED).exists():
        return RecordingStatus(spec, "failed", read_failure(spec.folder))
    return RecordingStatus(spec, "missing" if problem else "done", problem)


def format_protocol(spec: RecordingSpec) -> str:
    """Return in one line what a recording measures."""
    protocol = PROTOCOLS[spec.protocol]
    cadence = ", ".join(f"{name} {format_cadence(every)}" for name, every in protocol.every.items())
    seeds = protocol.seeds * protocol.rounds
    images = f"{protocol.prompts} prompts x {seeds} seeds of each part at about {protocol.scored_steps} steps"
    sampling = f"{protocol.sampling_steps or 'the preset number of'} sampling steps"
    cap = "" if protocol.share == 1 else f", trained to {100 * protocol.share:.0f} % of the full length"
    return f"preset {spec.protocol}: {images}, {sampling}; {cadence}; {spec.pairing}{cap}"


def record_missing(
    specs: Sequence[RecordingSpec],
    notify: Notify,
    *,
    places: Places | None = None,
    only_estimate: bool = False,
    describe: Callable[[Mapping[str, UnitSeconds]], Iterable[str]] = lambda units: (),
) -> list[RecordingStatus]:
    """Make the recordings that are missing, after reporting what is measured and how long it will take.

    Args:
        notify: Called with lines of progress.
        places: Where they are made; by default on this machine.
        only_estimate: Report, and record nothing; unit seconds that were measured before are not measured again.
        describe: From the unit seconds of each method to further lines of the report.

    Returns:
        The status of each recording.

    Raises:
        RefusedInput, ModelError: As `validate_recordings`; nothing has been recorded then.
    """
    places = places or Places(threads=specs[0].threads if specs else 1)
    validate_recordings(specs, places)
    missing = [spec for spec in specs if read_status(spec).state != "done"]
    notify(f"{len(specs)} runs, {len(missing)} of them to record; {format_protocol(specs[0])}")
    saved = _read_unit_seconds(Path(specs[0].records).expanduser()) if only_estimate else {}
    unmeasured = [spec for spec in missing if spec.method not in saved]
    units = {**saved, **measure_methods(unmeasured)}
    for line in (*format_estimate(missing, units, places), *describe(units)):
        notify(line)
    if only_estimate:
        return [read_status(spec) for spec in specs]
    for root in {Path(spec.records).expanduser() for spec in missing}:
        methods = {spec.method for spec in missing if Path(spec.records).expanduser() == root}
        _save_unit_seconds(root, {method: units[method] for method in units if method in methods})
    return run_sweep(specs, places=places, units=units, notify=notify)


def run_sweep(
    specs: Sequence[RecordingSpec],
    *,
    places: Places | None = None,
    units: Mapping[str, UnitSeconds] | None = None,
    notify: Notify = lambda line: None,
    every: float = 60,
) -> list[RecordingStatus]:
    """Make the recordings that are missing, damaged or failed, each in a process that writes to `LOG` in its folder.

    Interrupted, it asks each run under way to save.

    Args:
        places: Where they are made; by default on this machine.
        units: The unit seconds of each method, for the time left.
        notify: Called with lines of progress, whenever a run ends and every ``every`` seconds.

    Returns:
        The status of each recording.
    """
    missing = [spec for spec in specs if read_status(spec).state != "done"]
    if not missing:
        return [read_status(spec) for spec in specs]
    places = places or Places(threads=missing[0].threads)
    recordings = {str(spec.folder): spec for spec in missing}
    with places.connected(), interrupting_signals(), start_pool(places, len(missing)) as pool:
        progress = _SweepProgress(missing, units or {}, places.count)
        for spec in missing:
            pool.submit(_task(spec))
        for event in pool.events(every):
            if event and event.kind in ENDS:
                spec = recordings[event.task]
                if event.kind == "failed":
                    with suppress(FolderInUse), lock_folder(spec.folder):  # another process may be recording there
                        write_json(spec.folder / FAILED, {"reason": event.facts["reason"]})
                progress.end(spec, failed=event.kind == "failed")
                notify(f"{read_status(spec)}")
            if event is None or event.kind in ENDS:
                notify(progress.format([recordings[name] for name in pool.running]))
    return [read_status(spec) for spec in specs]


def format_statuses(statuses: Iterable[RecordingStatus]) -> Iterator[str]:
    """Yield a line for each recording that is not done, and one with the count of each state."""
    statuses = list(statuses)
    yield from (str(status) for status in statuses if status.state != "done")
    counts = {state: sum(status.state == state for status in statuses) for state in ("done", "failed", "missing")}
    yield ", ".join(f"{count} {state}" for state, count in counts.items() if count) or "nothing to record"


class _SweepProgress:
    """The progress of a sweep in estimated seconds of work, so that long runs count for more."""

    def __init__(self, specs: Sequence[RecordingSpec], units: Mapping[str, UnitSeconds], workers: int) -> None:
        self.units, self.workers, self.start = units, workers, time.monotonic()
        self.left = {spec: self._seconds_left(spec) for spec in specs}
        self.total, self.ended = sum(self.left.values()), 0

    def end(self, spec: RecordingSpec, failed: bool) -> None:
        """Count a run as ended."""
        if failed:
            self.total -= self.left[spec]  # this work will not be done
        self.ended, self.left[spec] = self.ended + 1, 0.0

    def format(self, running: Sequence[RecordingSpec]) -> str:
        """Return the progress in one line, with the runs under way as far as they are."""
        self.left |= {spec: self._seconds_left(spec) for spec in running}
        done, elapsed = self.total - sum(self.left.values()), time.monotonic() - self.start
        share = 100 * done / self.total if self.total else 100
        seconds = extrapolate_seconds_left(done, self.total, elapsed, self.workers if self.units else None)
        time_left = "" if seconds is None else f", about {format_duration(seconds)} left"
        return f"{self.ended} of {len(self.left)} runs, {share:.0f} % in {format_duration(elapsed)}{time_left}"

    def _seconds_left(self, spec: RecordingSpec) -> float:
        return estimate_seconds_left(spec, self.units.get(spec.method, ROUGH_UNITS))


def _save_unit_seconds(root: Path, units: Mapping[str, UnitSeconds]) -> None:
    """Save unit seconds, measured while the machine was idle, beside the runs that they price.

    Those of a method that is there stay, so that all of its runs have one price.
    """
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / SECONDS, {**units, **_read_unit_seconds(root)})


def _read_unit_seconds(root: Path) -> dict[str, UnitSeconds]:
    path = root / SECONDS
    return read_recorded_json(path, {str: {str: float}}) if path.exists() else {}


def _task(spec: RecordingSpec) -> WorkerTask:
    return WorkerTask(str(spec.folder), "dvar.recordings.record", spec.to_json(), spec.folder / LOG, spec.threads)
