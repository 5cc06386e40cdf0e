"""Cost of recordings: estimated counts of work times the measured seconds of each unit."""

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

from dvar.cluster.places import Places
from dvar.config.methods import PAPER_METHODS, CustomDiffusionConfig
from dvar.config.presets import preset_settings
from dvar.diffusion.sampling import batch_size
from dvar.recordings.protocol import PROTOCOLS, START_UP_CLASS_IMAGES, UNSEEN
from dvar.recordings.record import is_complete
from dvar.recordings.recorded_run import DONE
from dvar.recordings.recorder import Recorder
from dvar.recordings.score_samples import find_missing_rounds, load_scorer
from dvar.recordings.spec import RecordingSpec
from dvar.training.personalise import prepare
from dvar.training.progress import format_duration
from dvar.training.run_layout import TRACE

UnitSeconds = Mapping[str, float]
"""Seconds of each unit of work: "start_up", all before the first step, with `START_UP_CLASS_IMAGES` where there are
class images; "train", one update with the preset's batch; "forward", one held sample; "picture", one scored image."""

REPETITIONS = 15
"""Updates and evaluations that unit seconds are a median of: with five, a busy moment made one a third too long."""
ROUGH_UNITS = {"start_up": 1.0, "train": 1.0, "forward": 0.1, "picture": 2.0}
"""What units of work cost relative to each other, roughly, where nothing was measured."""
_EXPECTED_SHARE = 0.05


def estimate_seconds(spec: RecordingSpec, units: UnitSeconds) -> float:
    """Return the seconds that a whole recording takes; a training batch costs as many times more as it is larger."""
    config, protocol = spec.config, PROTOCOLS[spec.protocol]
    cap = config.max_train_steps
    forwards = (cap // config.probe_every + 1) * config.eval_batch_size
    series = [name for name in protocol.every if name != UNSEEN or spec.bundled]
    forwards += sum(protocol.forwards(name, cap) for name in series)
    images = float(len(spec.scored_steps) * 2 * protocol.image_count)
    sampling_steps = protocol.sampling_steps or config.num_inference_steps
    others = config.num_validation_images
    if isinstance(config, CustomDiffusionConfig) and not config.class_data_dir and config.prior_loss_weight:
        others += max(0, config.num_class_images - START_UP_CLASS_IMAGES)
    images += others * config.num_inference_steps / sampling_steps
    train = cap * _relative_batch(spec) * units["train"]
    return units["start_up"] + train + forwards * units["forward"] + images * units["picture"]


def estimate_seconds_left(spec: RecordingSpec, units: UnitSeconds) -> float:
    """Return the seconds that the rest of a recording takes: steps that are not trained, rounds without images."""
    protocol = PROTOCOLS[spec.protocol]
    round_seconds = 2 * protocol.prompts * protocol.seeds * units["picture"]
    later_rounds = len(spec.scored_steps) * (protocol.rounds - 1) * round_seconds
    training = estimate_seconds(spec, units) - units["start_up"] - later_rounds
    missing_rounds = sum(map(len, find_missing_rounds(spec).values()))
    return units["start_up"] + (1 - _trained_share(spec)) * training + missing_rounds * round_seconds


def extrapolate_seconds_left(done: float, total: float, elapsed: float, workers: int | None = None) -> float | None:
    """Return the seconds until all work is done, from the pace so far.

    The pace at first is that of starting up and of the many images of the first steps. With ``workers`` the estimate
    therefore counts too: as if `_EXPECTED_SHARE` of the work had been done as estimated.

    Args:
        done: Estimated seconds of the work that is done.
        total: Estimated seconds of all the work.
        elapsed: Seconds since the start.
        workers: Processes at once.

    Returns:
        None where there is nothing to go by.
    """
    assumed = _EXPECTED_SHARE * total if workers else 0.0
    if done + assumed <= 0:
        return None
    return (total - done) * (elapsed + assumed / (workers or 1)) / (done + assumed)


def measure_unit_seconds(spec: RecordingSpec) -> dict[str, float]:
    """Return the `UnitSeconds` of a recording, on this machine and now: medians of a few; no file is left behind.

    Raises:
        DvarError: As `dvar.recordings.record.record_run` raises before training.
    """
    torch.set_num_threads(spec.threads)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as records:
        changes: dict[str, Any] = (
            {"num_class_images": START_UP_CLASS_IMAGES} if spec.method == CustomDiffusionConfig.method else {}
        )
        spec = replace(spec, records=records)
        concept = spec.validate()
        run, _ = prepare(replace(spec.config, **changes))
        recorder = Recorder(spec, run, load_scorer(spec, concept))
        start_up = time.perf_counter() - start
        prompts = recorder.prompts["train"]
        train = _median_seconds(lambda number: run.learner.update(run.training_losses, number + 1), REPETITIONS)
        train /= _relative_batch(spec)
        forward = _median_seconds(lambda _: run.probe(), REPETITIONS) / run.config.eval_batch_size
        count = min(batch_size(run.config.resolution), len(prompts.prompts))
        images = _median_seconds(lambda _: recorder.generate(prompts.prompts[:count], prompts.seeds[:count]), 3)
    return {"start_up": start_up, "train": train, "forward": forward, "picture": images / count}


def measure_methods(specs: Sequence[RecordingSpec]) -> dict[str, dict[str, float]]:
    """Return the `UnitSeconds` of each method, measured now on the first recording of that method."""
    first = {spec.method: spec for spec in reversed(specs)}
    return {method: measure_unit_seconds(first[method]) for method in PAPER_METHODS if method in first}


def format_estimate(
    specs: Sequence[RecordingSpec], units: Mapping[str, UnitSeconds], places: Places | None = None
) -> Iterator[str]:
    """Yield how long recordings will take: a line for each method, and one for all.

    Args:
        units: The unit seconds of each method.
        places: Where they are made; by default on this machine.
    """
    if not specs:
        return
    remaining_seconds = {spec: estimate_seconds_left(spec, units[spec.method]) for spec in specs}
    for method, unit_seconds in units.items():
        if method not in {spec.method for spec in specs}:
            continue
        of_method = [seconds for spec, seconds in remaining_seconds.items() if spec.method == method]
        costs = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in unit_seconds.items())
        yield f"{method}: {len(of_method)} runs of {format_duration(sum(of_method) / len(of_method))} each ({costs})"
    slots = (places or Places(threads=specs[0].threads)).count
    total = format_duration(sum(remaining_seconds.values()) / min(slots, len(remaining_seconds)))
    yield f"about {total} with {slots} at once, if that does not slow each of them down"


def _relative_batch(spec: RecordingSpec) -> float:
    """Return the size of a run's training batch over its preset's."""
    config = spec.config
    return float(config.train_batch_size / preset_settings(config.preset or "paper", spec.method)["train_batch_size"])


def _median_seconds(work: Callable[[int], Any], count: int) -> float:
    """Return the median seconds of ``work(number)`` over ``count`` calls, after one that does not count."""
    seconds = []
    for number in range(count + 1):
        start = time.perf_counter()
        work(number)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def _trained_share(spec: RecordingSpec) -> float:
    """Return the share of its steps that a recording has trained, by the end of its trace; 0 if it must start again."""
    if (spec.folder / DONE).exists():
        return float(is_complete(spec.folder))
    try:
        with (spec.folder / TRACE).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            lines = file.read().split(b"\n")[:-1]
        return min(1.0, int(json.loads(lines[-1])["step"]) / spec.config.max_train_steps)
    except (OSError, ValueError, KeyError, IndexError):
        return 0.0
