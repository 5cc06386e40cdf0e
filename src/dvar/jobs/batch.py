"""A batch: many jobs, the events of their runs, and the summary."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dvar.cluster.places import Places
from dvar.cluster.pool import Pool, interrupting_signals
from dvar.cluster.task import EventKind, TaskEvent, WorkerTask
from dvar.config.fields import canonical_settings
from dvar.errors import RefusedInput
from dvar.files import write_json
from dvar.jobs.config import BatchConfig, batch_problems
from dvar.jobs.job import Job, is_url
from dvar.jobs.read_jobs import Table, read_jobs_and_problems
from dvar.jobs.status import JobStatus, read_status, summarise
from dvar.jobs.store import url_problems
from dvar.locks import lock_path
from dvar.training.pack_fit import pack_key
from dvar.training.preflight import launcher_problems

EVENTS, SUMMARY, LOCK, LOGS = "events.jsonl", "summary.json", ".batch.lock", "logs"


@dataclass(frozen=True)
class JobEvent:
    """An event in the life of a job.

    Attributes:
        job: The id of the job.
        kind: As of `dvar.cluster.task.TaskEvent`: "started", "progress", "retried", "preempted", "done", "failed" or
            "interrupted".
        worker: The name of the worker.
        time: Seconds since 1970.
        facts: "attempt" of a start; "step", "cap", "ratio" and "threshold" of progress; "reason" of a failure; "steps",
            "cap", "verdict", "sentence" and "seconds" of an end.
    """

    job: str
    kind: EventKind
    worker: str
    time: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the event as a line of JSON."""
        return json.dumps({"time": round(self.time, 3), "job": self.job, "event": self.kind, **self._rest()})

    def _rest(self) -> dict[str, Any]:
        return {"worker": self.worker, **self.facts}


class Batch:
    """Jobs that have been checked, and the workers that will train them.

    Args:
        source: What `read_jobs` reads.
        config: The settings of the batch.

    Raises:
        RefusedInput: Settings, jobs, folders or the cluster cannot be used; every problem is named.
    """

    def __init__(self, source: str | Path | Sequence[Table], config: BatchConfig) -> None:
        problems = [*batch_problems(config), *launcher_problems(os.environ, "dvar batch")]
        self.config, self.jobs, self.statuses = config, list[Job](), list[JobStatus]()
        self.failures: dict[str, str] = {}
        if not problems:
            self.jobs, problems = read_jobs_and_problems(source, config)
            problems += self._folder_problems() or [*self._conflicts(), *self._cluster_problems()]
        if problems:
            self._places.disconnect()
            raise RefusedInput(problems)

    @property
    def missing(self) -> list[Job]:
        """The jobs that are to be run."""
        return [status.job for status in self.statuses if status.state == "missing"]

    @property
    def folder(self) -> Path | None:
        """The folder of the batch; None behind a URL."""
        return None if is_url(self.config.output_dir) else Path(self.config.output_dir).expanduser().resolve()

    def events(self, every: float = 60.0) -> Iterator[JobEvent | None]:
        """Run the jobs that are missing, and yield their events; None after ``every`` seconds without one.

        At the end, whatever ended it, the summary is written into the folder of the batch.

        Raises:
            RefusedInput: Another process runs this batch, or the cluster has ended.
            KeyboardInterrupt: It was asked to stop; each run has saved, and the same batch goes on.
        """
        missing = self.missing
        if not missing:
            self._write_summary()
            self._places.disconnect()
            return
        with ExitStack() as stack:
            stack.enter_context(self._places.connected())
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_path(self.folder / LOCK, self.folder))
            stack.callback(self._write_summary)
            log = stack.enter_context((self.folder / EVENTS).open("ab", buffering=0)) if self.folder else None
            stack.enter_context(interrupting_signals())
            pool = Pool(
                self._places.start(len(missing)), retries=self.config.retries, preemptions=self.config.preemptions
            )
            stack.enter_context(pool)
            for job in self._in_turn(missing):
                pool.submit(self._task(job))
            for event in pool.events(every):
                job_event = self._take_event(event) if event else None
                if job_event and log and job_event.kind != "progress":
                    with suppress(OSError):  # a full disk: the runs report it, each with its reason
                        log.write(job_event.to_json().encode() + b"\n")
                yield job_event

    def summary(self) -> dict[str, Any]:
        """Return the summary of the batch as it is now."""
        self.statuses = [read_status(job) for job in self.jobs]
        return summarise(self.statuses, self.failures)

    def _write_summary(self) -> None:
        if self.folder:
            with suppress(OSError):  # as above
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / SUMMARY, self.summary())

    def _conflicts(self) -> list[str]:
        """Return what keeps jobs from their folders, having read the state of each."""
        self.statuses = [read_status(job) for job in self.jobs]
        return [status.conflict for status in self.statuses if status.conflict]

    def _folder_problems(self) -> list[str]:
        """Return what is wrong with where the runs are to be written."""
        config = self.config
        problems = url_problems(config.output_dir) if is_url(config.output_dir) else []
        if self.folder and self.folder.exists() and not self.folder.is_dir():
            problems.append(f"output_dir must be a folder, and {self.folder} is a file: choose another")
        return problems

    def _cluster_problems(self) -> list[str]:
        """Return what is wrong with where the runs are to be trained, having connected to the cluster."""
        paths = {path for job in self.jobs for path in job.paths} if self.config.ray else set()
        return self._places.problems(self.folder, paths)

    @property
    def _places(self) -> Places:
        config = self.config
        return Places(config.workers, config.threads, config.ray, config.gpus_per_worker, config.pack)

    def _in_turn(self, jobs: Sequence[Job]) -> list[Job]:
        """Return jobs in the order in which they begin; in packs, those of one base model follow one another."""
        if self.config.pack == 1:
            return list(jobs)
        order: dict[Any, int] = {}
        return sorted(jobs, key=lambda job: order.setdefault(pack_key(job.config), len(order)))

    @property
    def _logs(self) -> Path:
        """The folder of the workers' logs; behind a URL, one of this user on each machine."""
        if self.folder:
            return self.folder / LOGS
        user = f"-{os.getuid()}" if hasattr(os, "getuid") else ""  # on Windows each user has a temporary folder
        return Path(tempfile.gettempdir()) / f"dvar-jobs{user}" / LOGS

    def _task(self, job: Job) -> WorkerTask:
        program = "dvar.jobs.train_job" if self.config.pack == 1 else "dvar.jobs.train_pack"
        return WorkerTask(job.id, program, job.to_json(), self._logs / f"{job.id}.log", self.config.threads)

    def _take_event(self, event: TaskEvent) -> JobEvent:
        if event.kind == "failed":
            self.failures[event.task] = str(event.facts["reason"])
        return JobEvent(event.task, event.kind, event.worker, time.time(), event.facts)


def batch(source: str | Path | Sequence[Table], **settings: Any) -> Iterator[JobEvent]:
    """Train many jobs on several workers, and yield their events; jobs that are done are not trained again.

    Args:
        source: A TOML or CSV file or a folder of folders, as ``dvar batch`` takes it, or a list of tables, each with an
            "id", a "method" and settings of that method.
        settings: Settings of ``dvar batch``: output_dir, workers, pack, ray, …

    Raises:
        RefusedInput: Settings, jobs, folders or the cluster cannot be used; every problem is named, and nothing has
            been started.
    """
    opened = Batch(source, BatchConfig(**canonical_settings(settings, BatchConfig)))
    return (event for event in opened.events() if event)
