"""A log that is followed while another program writes it, judged at each new record."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import numpy as np

from dvar.errors import RefusedInput, TraceError
from dvar.logs.reader import read_log
from dvar.runs.replay import replay_rule
from dvar.stopping.rules import Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

FileStates = tuple[tuple[str, int, int], ...]
"""Name, size in bytes and time of the last change in nanoseconds of each file of a log."""


STOPS = "the rule stops"
AWAITS_RECORD = "the log holds a stop from before it was followed, which counts once there is a new record"


@dataclass(frozen=True)
class FollowedLog:
    """The state of a log that is followed.

    Attributes:
        trace: All records so far.
        verdict: The verdict at the newest record, or the first one that stops; None while there is no record.
        note: What happened to the log beside growing: it cannot be read yet, was rotated or restarted.
        end: Why following ends, in words; empty while it goes on.
    """

    trace: Trace
    verdict: Verdict | None = None
    note: str = ""
    end: str = ""


def follow_log(
    log: Path,
    rule: Rule,
    *,
    metric: str | None = None,
    step_column: str | None = None,
    poll_seconds: float = 5.0,
    idle_seconds: float = 3600.0,
    is_running: Callable[[], bool] = lambda: True,
    only_new: bool = False,
    wait: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[FollowedLog]:
    """Yield what is known of a log after each new record, and whenever something else happens to it, until an end.

    The end is the first verdict that stops; or the end of the program that writes; or too long a time without a new
    record. The log need not exist yet. A log that is rotated is continued by the new file; one that is restarted is
    judged again; where a run was resumed, its last attempt counts.

    Args:
        log: A file or a folder of any format that `read_log` reads.
        rule: The rule that judges.
        metric: As for `read_log`.
        step_column: As for `read_log`.
        poll_seconds: Seconds from one look at the files to the next; they are read only when they have changed.
        idle_seconds: Seconds without a new record after which to end.
        is_running: Whether the program that writes the log is still running.
        only_new: Whether a stop counts only once there is a record that was not there at the first look: what is there
            then may be of an earlier run, whose log the program will go on with or replace.
        wait: Waits for some seconds.
        clock: Returns the time in seconds.

    Raises:
        RefusedInput: The rule cannot judge the curve.
    """
    now = FollowedLog(Trace())
    states: FileStates | None = None
    seen_warnings: set[str] = set()
    last_note = ""
    last_record = clock()
    awaits_record, was_read = only_new and log.exists(), False
    while True:
        running = is_running()  # before the log is read, so that what the program wrote last is read
        if (new_states := _list_states(log)) is None or new_states != states or not running:
            states = new_states
            try:
                newest = _read_quietly(log, metric, step_column, running, seen_warnings)
            except (RefusedInput, TraceError, OSError) as error:
                if now.note != (note := str(error)):
                    now = replace(now, note=note)
                    yield now
                states = None  # it may be readable at the next look although no file changes, such as a locked database
            else:
                trace, note = join_traces(now.trace, newest)
                note, last_note = "" if note == last_note else note, note
                agreed = find_last_agreed_step(now.trace, trace)
                grows = not agreed == _last_evaluation(now.trace) == _last_evaluation(trace)
                if grows:
                    last_record = clock()
                awaits_record, was_read = awaits_record and not (was_read and grows), True
                verdict = now.verdict
                if len(trace) and (verdict is None or verdict.step > agreed):
                    verdict = rule(trace.cut(agreed))
                now = FollowedLog(trace, verdict, note)
                if note:
                    yield now
                if verdict and verdict.stop and not awaits_record:
                    yield replace(now, note="", end=STOPS)
                    return
                for verdict in replay_rule(trace, rule, after=agreed):
                    now = FollowedLog(trace, verdict)
                    if verdict.stop and not awaits_record:
                        yield replace(now, end=STOPS)
                        return
                    if verdict.stop:
                        yield replace(now, note=f"{AWAITS_RECORD}, at step {verdict.step}")
                        break
                    yield now
        if not running:
            yield replace(now, end="the program that writes the log has ended")
            return
        if clock() - last_record >= idle_seconds:
            yield replace(now, end=f"there was no new record for {idle_seconds / 60:g} minutes")
            return
        wait(poll_seconds)


def join_traces(past: Trace, newest: Trace) -> tuple[Trace, str]:
    """Return the trace of a log of which ``past`` was read before and ``newest`` now, and a note if it is another file.

    A file that goes on where the log ended before, or within it, continues it: the log was rotated, or the run resumed
    into a new file. One that starts as early as the log did replaces it.
    """
    if not len(past.steps) or not len(newest.steps):
        return newest if len(newest.steps) else past, ""
    first = int(newest.steps[0])
    if first > past.steps[min(1, len(past.steps) - 1)]:
        try:
            trace = past.cut(first - 1)
            for record in newest.records:
                trace.record(**record)
        except TraceError:  # another number of held samples: this is another run
            return newest, f"the log was restarted at step {first}"
        return trace, f"the log goes on in a new file from step {first}: the records before it count"
    if newest.last_step < past.last_step and find_last_agreed_step(past, newest) < first:
        return newest, f"the log was restarted at step {first}"
    return newest, ""


def find_last_agreed_step(past: Trace, newest: Trace) -> int:
    """Return the last step up to which both traces hold the same evaluations; -1 where they differ from the first."""
    count = min(len(past.steps), len(newest.steps))
    same = (past.steps[:count] == newest.steps[:count]) & np.isclose(
        past.values[:count], newest.values[:count], rtol=0.0, atol=0.0, equal_nan=True
    )
    agreed = count if same.all() else int(np.argmin(same))
    return int(past.steps[agreed - 1]) if agreed else -1


def _last_evaluation(trace: Trace) -> int:
    return int(trace.steps[-1]) if len(trace.steps) else -1


def _list_states(log: Path) -> FileStates | None:
    """Return the states of all files of a log: those in a folder; or a file and those beside it that begin as it.

    Returns:
        None where they cannot be listed at this moment.
    """
    files = log.rglob("*") if log.is_dir() else log.parent.glob(f"{escape(log.name)}*")
    states = []
    try:
        for file in files:
            try:
                state = file.stat()
            except FileNotFoundError:  # removed in this moment
                continue
            states.append((str(file), state.st_size, state.st_mtime_ns))
    except OSError:  # a folder was removed in this moment, such as an old checkpoint
        return None
    return tuple(sorted(states))


def _read_quietly(log: Path, metric: str | None, step_column: str | None, live: bool, seen_warnings: set[str]) -> Trace:
    """Read a log, and repeat no warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trace = read_log(log, metric, step_column, live=live)
    for warning in caught:
        if (text := str(warning.message)) not in seen_warnings:
            seen_warnings.add(text)
            warnings.warn(text, stacklevel=2)
    return trace
