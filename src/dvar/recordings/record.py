"""Recording one run: training it past every stop, or going on with a recording that was interrupted."""

# A run is recorded once for each method, concept and seed; strategies are evaluated on it afterwards.  It is a run of
# the trainer like any other, except that nothing ends it before its cap: its trace holds what `dvar train` under its
# config.json would record, bit for bit.  `dvar.recordings.recorded_run` describes the files.

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvar.cluster.program import serve
from dvar.diffusion.devices import float32_arithmetic
from dvar.errors import CheckpointError, DvarError, NonFiniteLoss, RefusedInput
from dvar.files import read_json, write_json
from dvar.locks import lock_folder
from dvar.recordings.image_metrics import Scorer
from dvar.recordings.recorded_run import DONE, FAILED, RESCORED, ROUNDS, SCORES, RecordedRun, file_digest
from dvar.recordings.recorder import Recorder
from dvar.recordings.restore import RESCORED_SHEETS, SHEETS, WEIGHTS, weights_path
from dvar.recordings.score_samples import load_scorer, score_missing_rounds
from dvar.recordings.spec import CONDITIONS, RecordingSpec, read_conditions
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import Dvar, FixedSteps, Rule
from dvar.stopping.trace import Trace
from dvar.training.checkpoint import latest_checkpoint
from dvar.training.loop import StepRecord
from dvar.training.personalise import interruption, prepare
from dvar.training.run_layout import CONFIG, TRACE

Consumer = Callable[[StepRecord], None]


def record_run(spec: RecordingSpec, consumers: Sequence[Consumer] = ()) -> Path:
    """Record a run and return its folder.

    An interrupted recording goes on from its last checkpoint, one that lacks rounds of images has them generated, and a
    damaged one is made again. Nothing but a recording under the same conditions is ever touched.

    Args:
        consumers: Called with each step record.

    Raises:
        RefusedInput, ModelError: The recording cannot be made; raised before training.
        NonFiniteLoss: Training broke.
        KeyboardInterrupt: The process was asked to stop; the recording can go on.
    """
    concept = spec.validate()
    with lock_folder(spec.folder), float32_arithmetic(spec.config.allow_tf32):
        torch.set_num_threads(spec.threads)
        scorer = load_scorer(spec, concept)
        if problem := spec.find_conflict():
            raise RefusedInput([problem])
        (spec.folder / FAILED).unlink(missing_ok=True)
        if not is_complete(spec.folder):
            _train(spec, scorer, consumers)
        score_missing_rounds(spec, concept, scorer)
    return spec.folder


def is_complete(folder: Path) -> bool:
    """Return whether a folder holds a finished recording that can be read, whatever rounds of images it has."""
    try:
        return bool(RecordedRun.open(folder))
    except DvarError:
        return False


def read_resumable_scores(spec: RecordingSpec) -> list[dict[str, Any]] | None:
    """Return the rows of scores of an interrupted recording, up to its last checkpoint.

    Returns:
        None if it cannot go on: there is no recording, it was finished, or a part of it is damaged.
    """
    folder = spec.folder
    if (folder / DONE).exists() or read_conditions(folder) is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            last = latest_checkpoint(folder).step
        rows = [row for row in read_json(folder / SCORES)["rows"] if row["step"] <= last]
        steps = [row["step"] for row in rows if weights_path(folder, row["step"]).exists()]
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return None
    return rows if steps == [step for step in spec.scored_steps if step <= last] else None


def remove_measurements(folder: Path) -> None:
    """Remove what a recording alone writes into a run's folder, except its conditions; the rest is the trainer's."""
    for name in (DONE, SCORES, FAILED, ROUNDS, RESCORED):
        (folder / name).unlink(missing_ok=True)
    for name in (WEIGHTS, SHEETS, RESCORED_SHEETS):
        shutil.rmtree(folder / name, ignore_errors=True)


class LiveStops:
    """The paper's rule and ours, called along a run; returns whether one of them begins to stop at this step."""

    def __init__(self, window: int, threshold: float, trace: Trace) -> None:
        self.rules: tuple[Rule, ...] = (Dvar(window, threshold), Dvar(window, threshold, strict_paper=True))
        self.stopping = [rule(trace).stop for rule in self.rules]

    def __call__(self, trace: Trace) -> bool:
        before, self.stopping = self.stopping, [rule(trace).stop for rule in self.rules]
        return any(now and not then for then, now in zip(before, self.stopping, strict=True))


def run_task(argument: str, report: Callable[..., None]) -> dict[str, Any]:
    """Record the run that a sweep specifies in JSON, reporting its steps."""
    record_run(RecordingSpec.from_json(argument), [lambda step: report(step=step.step)])
    return {}


def _train(spec: RecordingSpec, scorer: Scorer, consumers: Sequence[Consumer]) -> None:
    """Train the run to its cap with a recorder, from its last checkpoint if it can go on."""
    folder, config = spec.folder, spec.config
    write_json(folder / CONDITIONS, spec.conditions)
    rows = read_resumable_scores(spec)
    if rows is None:
        remove_measurements(folder)
    resume = None if rows is None else "latest"
    run, checkpoint = prepare(replace(config, overwrite=rows is None, resume_from_checkpoint=resume))
    recorder = Recorder(spec, run, scorer, rows or ())
    run.rule = FixedSteps(config.max_train_steps)
    run.learner.trace = Trace({**run.learner.trace.header, **recorder.header})
    run.open(checkpoint)
    verdict = run.rule(run.learner.trace)
    live_stops = LiveStops(config.window, config.threshold, run.learner.trace)
    with interruption() as interrupted:
        for step in run.steps(interrupted, recorder):
            verdict = step.verdict
            if live_stops(run.learner.trace):
                recorder.save_weights(step.step)
            for consumer in consumers:
                consumer(step)
    if verdict.reason is Reason.INTERRUPTED:
        raise KeyboardInterrupt
    if verdict.reason is Reason.NON_FINITE:
        raise NonFiniteLoss(f"training broke: {verdict.sentence}")
    run.finish(verdict)
    versions = read_json(folder / CONFIG)["versions"]
    hashes = {name: file_digest(folder / name) for name in (TRACE, SCORES)}
    write_json(folder / DONE, {"hashes": hashes, "versions": versions, "threads": spec.threads})


if __name__ == "__main__":
    sys.exit(serve(run_task))
