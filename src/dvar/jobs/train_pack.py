"""The program that trains the jobs of a batch, several at once in one pack."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dvar.cluster.program import End, serve_team
from dvar.errors import FolderInUse
from dvar.jobs.base_models import BaseModels
from dvar.jobs.job import Job
from dvar.jobs.store import RunStore, run_folder
from dvar.jobs.train_job import (
    WAIT_SECONDS,
    Report,
    begin_job,
    end_job,
    has_ended,
    job_consumers,
    validate_end,
)
from dvar.training.pack import End as TrainingEnd
from dvar.training.pack import Pack
from dvar.training.pack_fit import pack_key
from dvar.training.personalise import interruption


@dataclass
class _Member:
    """A job of a pack, from its arrival on.

    Attributes:
        job: The job.
        report: Takes its progress.
        due: The moment before which it does not begin.
        waits: How often it has waited for its folder.
        scope: Holds its store open.
        store: The folder of its run, once it has begun.
    """

    job: Job
    report: Report
    due: float = 0.0
    waits: int = 0
    scope: ExitStack = field(default_factory=ExitStack)
    store: RunStore = field(init=False)

    def postpone(self) -> None:
        """Let it begin a second later: another process uses its folder."""
        self.due, self.waits = time.monotonic() + 1.0, self.waits + 1
        self.scope.close()


class JobPack:
    """Jobs that a worker trains at once, as `JobTrainer` trains one.

    One whose base model is another than that of the jobs in training begins once these have ended, and so do those
    that come after it.

    Args:
        load: The loader of base models.
        sleep: Waits for so many seconds.
    """

    def __init__(self, load: BaseModels, sleep: Callable[[float], None] = time.sleep) -> None:
        self.load, self.sleep = load, sleep
        self._members: dict[str, _Member] = {}
        self._waiting: list[str] = []
        self._cancelled: set[str] = set()
        self._signals = ExitStack()
        self._interrupted: Callable[[], bool] = lambda: False
        self._pack = Pack(load, lambda: self._interrupted())

    def __len__(self) -> int:
        return len(self._members)

    def add(self, name: str, argument: str, report: Report) -> None:
        """Let a job join; it begins at the next `advance`, or when those before it let it."""
        if not self._members:  # while there is none, a signal ends the process
            self._interrupted = self._signals.enter_context(interruption())
        self._members[name] = _Member(Job.from_json(argument), report)
        self._waiting.append(name)

    def cancel(self, name: str) -> None:
        """Ask a job to save and end."""
        self._cancelled.add(name)
        self._pack.cancel(name)

    def advance(self) -> Mapping[str, End]:
        """Go on as `Pack.advance` does, and return the ends of jobs by name."""
        ends = self._begin_waiting()
        for name, end in (self._pack.advance() if len(self._pack) else {}).items():
            member = self._members[name]
            if isinstance(end, FolderInUse) and member.waits < WAIT_SECONDS:  # as `JobTrainer` waits
                member.postpone()
                self._waiting.append(name)
            else:
                ends[name] = _conclude(member, end)
        for name in ends:
            self._members.pop(name).scope.close()
            self._cancelled.discard(name)
        if not self._members:
            self._signals.close()
        elif not len(self._pack):
            self.sleep(1.0)
        return ends

    def _begin_waiting(self) -> dict[str, End]:
        """Let the jobs begin that can; return the ends of those that end at once."""
        ends: dict[str, End] = {}
        for name in list(self._waiting):
            member = self._members[name]
            if name in self._cancelled or self._interrupted():
                ends[name] = KeyboardInterrupt()
            elif member.due > time.monotonic():
                continue
            elif not self._fits(member.job):
                break
            else:
                try:
                    if facts := self._begin(name, member):
                        ends[name] = facts
                except Exception as error:
                    if isinstance(error, FolderInUse) and member.waits < WAIT_SECONDS:
                        member.postpone()
                        continue
                    ends[name] = error
            self._waiting.remove(name)
        return ends

    def _fits(self, job: Job) -> bool:
        """Return whether a job has the base model of all jobs that have begun."""
        begun = [self._members[name].job for name in self._members if name not in self._waiting]
        return all(pack_key(other.config) == pack_key(job.config) for other in begun)

    def _begin(self, name: str, member: _Member) -> Mapping[str, Any] | None:
        """Let a job begin; return the facts about its end if it has ended before."""
        job = member.job
        member.store = store = member.scope.enter_context(run_folder(job.config.output_dir, job.id))
        if has_ended(store):
            return end_job(job, store)
        config = begin_job(job, store)
        self._pack.add(name, config, job_consumers(config, store, member.report))
        if name in self._cancelled:  # meanwhile
            self._pack.cancel(name)
        return None


def _conclude(member: _Member, end: TrainingEnd) -> End:
    """Return how a job has ended, by the end of its training."""
    if isinstance(end, Exception):
        return end
    try:
        validate_end(end, member.store)
        return end_job(member.job, member.store)
    except (Exception, KeyboardInterrupt) as error:
        return error


if __name__ == "__main__":
    sys.exit(serve_team(JobPack(BaseModels())))
