"""What a recording costs: counts of its work times the seconds of each unit."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dvar.config.training import CONFIGS, CustomDiffusionConfig
from dvar.diffusion.sampling import BATCH
from dvar.recordings.archive import DONE
from dvar.recordings.protocol import FORWARDS, PROTOCOLS, UNSEEN
from dvar.recordings.recorder import Recorder, whole
from dvar.recordings.score_samples import lacking, scorer_of
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.worker_pool import slots
from dvar.training.personalise import prepared
from dvar.training.progress import clock


def expected_seconds(recording: RecordingSpec, units: Mapping[str, float]) -> float:
    """Return what the recording takes, by counts times ``units``."""
    config, plan = recording.config, PROTOCOLS[recording.plan]
    cap = config.max_train_steps
    forwards = (cap // config.probe_every + 1) * config.eval_batch_size
    series = [name for name in plan.every if name != UNSEEN or recording.bundled]
    forwards += sum((cap // plan.every[name] + 1) * FORWARDS[name] for name in series)
    pictures = float(len(recording.scored) * 2 * plan.pictures)
    steps = plan.sampling_steps or config.num_inference_steps
    others = config.num_validation_images
    if isinstance(config, CustomDiffusionConfig) and not config.class_data_dir and config.prior_loss_weight:
        others += config.num_class_images
    pictures += others * config.num_inference_steps / steps
    return units["start_up"] + cap * units["train"] + forwards * units["forward"] + pictures * units["picture"]


TIMED = 15
"""Updates and evaluations that unit seconds are a median of: with five, a busy moment made one a third too long."""


def unit_seconds(recording: RecordingSpec) -> dict[str, float]:
    """Return the seconds of each unit of work, on this machine and now: "start_up", all before the first step;
    "train", one update; "forward", one held sample; "picture", one scored picture.  A median of a few, nothing is kept.

    Raises: all that `record` would raise before training.
    """
    torch.set_num_threads(recording.threads)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as elsewhere:
        few: dict[str, Any] = {"num_class_images": 2} if recording.method == CustomDiffusionConfig.method else {}
        apart = replace(recording, records=elsewhere)
        concept = apart.check()
        job, _ = prepared(replace(apart.config, **few))
        recorder = Recorder(apart, job, scorer_of(apart, concept))
        start_up = time.perf_counter() - started
        wanted = recorder.shots["train"]
        train = _median(lambda number: job.learner.update(job.training_losses, number + 1), TIMED)
        forward = _median(lambda _: job.probe(), TIMED) / job.config.eval_batch_size
        count = min(BATCH, len(wanted.prompts))
        pictures = _median(lambda _: recorder.draw(wanted.prompts[:count], wanted.seeds[:count]), 3)
    return {"start_up": start_up, "train": train, "forward": forward, "picture": pictures / count}


def _median(work: Callable[[int], Any], count: int) -> float:
    """The median seconds of ``work(i)``, after one time that is not counted."""
    spent = []
    for number in range(count + 1):
        started = time.perf_counter()
        work(number)
        spent.append(time.perf_counter() - started)
    return float(np.median(spent[1:]))


ALIKE = {"start_up": 1.0, "train": 1.0, "forward": 0.1, "picture": 2.0}
"""What units of work cost beside each other, roughly, where nothing was measured."""


_TRUST = 0.05


def estimate(recordings: Sequence[RecordingSpec]) -> dict[str, dict[str, float]]:
    """Return by method the seconds of each unit of work, measured now on the first recording of that method."""
    first = {recording.method: recording for recording in reversed(recordings)}
    return {method: unit_seconds(first[method]) for method in CONFIGS if method in first}


def expected(
    recordings: Sequence[RecordingSpec], units: Mapping[str, Mapping[str, float]], workers: int | None = None
) -> Iterator[str]:
    """Yield what ``recordings`` will take by `estimate`'s ``units``: a line for each method, and the whole."""
    if not recordings:
        return
    work = {run: seconds_left(run, units[run.method]) for run in recordings}
    for method, unit in units.items():
        of = [seconds for run, seconds in work.items() if run.method == method]
        costs = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in unit.items())
        yield f"{method}: {len(of)} runs of {clock(sum(of) / len(of))} each ({costs})"
    places = len(slots(workers, recordings[0].threads))
    in_all = clock(sum(work.values()) / min(places, len(work)))
    yield f"about {in_all} with {places} at once, if that does not slow each of them down"


def seconds_left(recording: RecordingSpec, units: Mapping[str, float]) -> float:
    """Return what is left of a recording, by counts times ``units``: steps not trained and rounds not drawn."""
    plan = PROTOCOLS[recording.plan]
    of_round = 2 * plan.prompts * plan.seeds * units["picture"]
    later = len(recording.scored) * (plan.rounds - 1) * of_round
    training = expected_seconds(recording, units) - units["start_up"] - later
    lacking_rounds = sum(map(len, lacking(recording).values()))
    return units["start_up"] + (1 - _trained(recording)) * training + lacking_rounds * of_round


def time_left(done: float, in_all: float, spent: float, at_once: int | None = None) -> float | None:
    """Return the seconds until all work is done, of which ``done`` of ``in_all`` expected seconds took ``spent``.

    The pace at first is that of starting up and of the many pictures of the first steps.  With ``at_once``, the
    processes side by side, what was expected therefore counts too: as if `_TRUST` of the work had gone as expected.
    None where nothing can be said.
    """
    trusted = _TRUST * in_all if at_once else 0.0
    if done + trusted <= 0:
        return None
    return (in_all - done) * (spent + trusted / (at_once or 1)) / (done + trusted)


def _trained(recording: RecordingSpec) -> float:
    """The part of its steps that a run has made, by the end of its trace; none of one that must be made anew."""
    if (recording.folder / DONE).exists():
        return float(whole(recording.folder))
    try:
        with (recording.folder / "trace.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            lines = file.read().split(b"\n")[:-1]
        return min(1.0, int(json.loads(lines[-1])["step"]) / recording.config.max_train_steps)
    except (OSError, ValueError, KeyError, IndexError):
        return 0.0
