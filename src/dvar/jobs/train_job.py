"""The program that trains the jobs of a batch, one after another."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dvar.cluster.program import serve
from dvar.config.training import TrainingConfig
from dvar.errors import CheckpointError, FolderInUse, NonFiniteLoss
from dvar.files import remove
from dvar.jobs.base_models import BaseModels
from dvar.jobs.config import Checkpoints
from dvar.jobs.job import JOB, Job, is_url
from dvar.jobs.model_cache import cached_model
from dvar.jobs.status import END_SCHEMA, JOB_SCHEMA, end_facts
from dvar.jobs.store import RunStore, read_run_json, run_folder
from dvar.locks import lock_folder
from dvar.stopping.diagnosis import Reason
from dvar.training.checkpoint import Checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import personalise
from dvar.training.run import TrainingResult, write_config
from dvar.training.run_layout import RESULT, TRACE, checkpoint_paths, find_foreign, find_written

WAIT_SECONDS = 600
"""How long a job waits for the worker that trained it last, or that copies its base model."""
REPORT_SECONDS = 1.0
Report = Callable[..., None]


class JobTrainer:
    """A trainer of jobs.

    Args:
        load: The loader of base models.
        sleep: Waits for so many seconds.
    """

    def __init__(self, load: BaseModels, sleep: Callable[[float], None] = time.sleep) -> None:
        self.load, self.sleep = load, sleep

    def __call__(self, argument: str, report: Report) -> Mapping[str, Any]:
        """Train a job, from its last checkpoint if it has one, and return the facts about its end.

        Raises:
            DvarError: As `personalise`.
            KeyboardInterrupt: It was asked to stop, and can go on later.
        """
        job = Job.from_json(argument)
        with run_folder(job.config.output_dir, job.id) as store:
            if not has_ended(store):
                validate_end(self._train_when_free(job, store, report), store)
            return end_job(job, store)

    def _train_when_free(self, job: Job, store: RunStore, report: Report) -> TrainingResult:
        for _ in range(WAIT_SECONDS):
            try:
                return self._train(job, store, report)
            except FolderInUse:  # by a worker whose driver has died: it is saving
                self.sleep(1.0)
        return self._train(job, store, report)

    def _train(self, job: Job, store: RunStore, report: Report) -> TrainingResult:
        config = begin_job(job, store)
        return personalise(config, job_consumers(config, store, report), load=self.load)


def has_ended(store: RunStore) -> bool:
    """Return whether a run has ended, and its worker perhaps been lost before it could say so."""
    return read_run_json(str(store.folder), RESULT, END_SCHEMA) is not None


def begin_job(job: Job, store: RunStore) -> TrainingConfig:
    """Return the config to train a job by, from its last whole checkpoint if it has one.

    Raises:
        FolderInUse: Another process writes into its folder.
    """
    folder = store.folder
    with lock_folder(folder):  # the worker that trained it last may be saving
        can_resume = _has_whole_checkpoint(folder)
        saved = read_run_json(str(folder), JOB, JOB_SCHEMA)
        is_own = saved is not None and saved["digest"] == job.digest
        if can_resume or is_own or not find_foreign(folder):
            store.claim({"id": job.id, "digest": job.digest})
        if is_own and not can_resume:  # a worker may have been lost before it had stored the config
            write_config(folder, job.config)
    model = job.config.pretrained_model_name_or_path
    return replace(
        job.config,
        pretrained_model_name_or_path=cached_model(model) if is_url(model) else model,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if can_resume else None,
        overwrite=not can_resume and bool(find_written(folder)),
    )


def _has_whole_checkpoint(folder: Path) -> bool:
    """Return whether a run can be resumed: a worker that is lost while it pushes leaves a part of a checkpoint."""
    for path in checkpoint_paths(folder):
        with suppress(CheckpointError):
            Checkpoint.read(path)
            return True
    return False


def job_consumers(config: TrainingConfig, store: RunStore, report: Report) -> list[Callable[[StepRecord], None]]:
    """Return what follows the steps of a job: it reports progress, and pushes each checkpoint."""
    return [_ProgressReports(config.max_train_steps, report), _Pushes(store)]


def validate_end(result: TrainingResult, store: RunStore) -> None:
    """Raise KeyboardInterrupt if a run was asked to stop, and push what it has saved."""
    if result.verdict.reason is Reason.INTERRUPTED:
        store.push()
        raise KeyboardInterrupt


def end_job(job: Job, store: RunStore) -> Mapping[str, Any]:
    """Return the facts about the end of a job, once its run is pruned and pushed.

    Raises:
        NonFiniteLoss: A loss was not finite.
    """
    prune(store.folder, job.checkpoints)
    store.push()
    facts = end_facts(read_run_json(str(store.folder), RESULT, END_SCHEMA), job)
    if facts["verdict"] == Reason.NON_FINITE.value:
        raise NonFiniteLoss(facts["sentence"])
    return facts


class _ProgressReports:
    """A consumer of steps that reports the first one, and then one each second."""

    def __init__(self, cap: int, report: Report) -> None:
        self.cap, self.report, self.due = cap, report, 0.0

    def __call__(self, step: StepRecord) -> None:
        now = time.monotonic()
        if now >= self.due or step.verdict.stop:
            self.due = now + REPORT_SECONDS
            metrics = step.verdict.metrics
            numbers = {name: metrics[name] for name in ("ratio", "threshold") if name in metrics}
            self.report(step=step.step, cap=self.cap, **numbers)


class _Pushes:
    """A consumer of steps that pushes the run where there is a new checkpoint."""

    def __init__(self, store: RunStore) -> None:
        self.store, self.newest = store, self._newest_checkpoint(store)

    def __call__(self, step: StepRecord) -> None:
        newest = self._newest_checkpoint(self.store)
        if newest != self.newest:
            self.newest = newest
            self.store.push()

    @staticmethod
    def _newest_checkpoint(store: RunStore) -> Path | None:
        return next(iter(checkpoint_paths(store.folder)), None)


def prune(folder: Path, checkpoints: Checkpoints) -> None:
    """Remove the checkpoints of a finished run but those it is to leave, and what a resume has set aside."""
    paths = checkpoint_paths(folder)
    for path in {"none": paths, "last": paths[1:], "all": []}[checkpoints]:
        remove(path)
    if checkpoints == "none":
        for path in folder.glob(f"{TRACE}.cut-*"):
            remove(path)


if __name__ == "__main__":
    sys.exit(serve(JobTrainer(BaseModels())))
