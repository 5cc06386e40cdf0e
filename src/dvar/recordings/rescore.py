"""Rescoring: the checkpoints that strategies keep, with images generated and scored from fresh seeds."""

# A strategy that looks at images keeps the step whose images looked best, partly by luck; and most strategies end
# between scored steps.  So the model of each kept step is restored, generates as many images as the run's scored steps
# have, from seeds that no strategy has seen, and their scores are written into the run's rescored.json.

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvar import mini
from dvar.cluster.places import Places
from dvar.cluster.pool import interrupting_signals
from dvar.cluster.program import serve
from dvar.cluster.task import ENDS, WorkerTask
from dvar.diffusion.devices import float32_arithmetic
from dvar.errors import RefusedInput
from dvar.files import read_json, write_json
from dvar.locks import lock_folder
from dvar.recordings.archive import RecordingArchive, load_rescored
from dvar.recordings.pools import start_pool
from dvar.recordings.protocol import CHECKPOINTS, ScoringPrompts
from dvar.recordings.recorded_run import DONE, RESCORED, RecordedRun, RescoredRun
from dvar.recordings.restore import RESCORED_SHEETS, restore_runs, sheet_path, weights_path, write_sheet
from dvar.recordings.score_samples import generate_and_score, load_scorer
from dvar.recordings.spec import RecordingSpec, read_conditions
from dvar.training.progress import format_duration
from dvar.training.run import TrainingRun

SEED_OFFSET = 10_000
"""Added to the seeds of a recorded run's own images, which count from 0."""
PARTS = ("train", "validation")
LOG = "rescore.log"


def rescore_steps(folder: str | Path, steps: Iterable[int]) -> Path:
    """Score steps of a recorded run on fresh seeds, and return the file with these scores and the earlier ones.

    The file is written after each step, so that an interrupted call can go on. Steps that were rescored when the run
    had fewer images are rescored again.

    Raises:
        RefusedInput: The recording is unfinished or damaged, or another process is writing it.
        ModelError: A judge cannot be loaded.
        CheckpointError: A step cannot be restored.
    """
    folder = Path(folder)
    with lock_folder(folder), float32_arithmetic():
        header, done = RecordedRun.open(folder).header, read_json(folder / DONE)
        seeds, before = [SEED_OFFSET + seed for seed in header["seeds"]], RescoredRun.open(folder)
        rows = read_json(folder / RESCORED)["rows"] if before and before.image_count == len(seeds) else []
        prompts = {part: ScoringPrompts(header[f"{part}_prompts"], header[f"{part}_texts"], seeds) for part in PARTS}
        torch.set_num_threads(done.get("threads", 1))
        missing, scorer = sorted(set(steps) - {row["step"] for row in rows}), None
        for step, run in zip(missing, restore_runs(folder, missing), strict=True):
            scorer = scorer or load_scorer(_spec_of(folder, run), run.concept)
            images, scores = generate_and_score(run, prompts, scorer, header["sampling_steps"])
            write_sheet(sheet_path(folder, step, RESCORED_SHEETS), images)
            rows.append({"step": step, **scores})
            write_json(folder / RESCORED, {"header": {"hashes": done["hashes"], "seeds": seeds}, "rows": rows})
    return folder / RESCORED


def rescore_archive(
    archive: RecordingArchive,
    steps: Mapping[RecordedRun, Collection[int]],
    notify: Callable[[str], None],
    ray: str | None = None,
) -> RecordingArchive:
    """Return the archive with steps of its runs rescored, several runs at once.

    Steps that are rescored already are not done again. A run that cannot be rescored is reported and left as it is; one
    from an archive file, or that `dvar record` did not write, has no models to restore.

    Args:
        steps: The steps of each run.
        notify: Called with lines of progress.
        ray: The address of a Ray cluster, as `Places` takes it; by default they are rescored on this machine.
    """
    missing = {run: _missing_steps(archive, run, numbers) for run, numbers in steps.items() if _can_restore(run)}
    missing = {run: numbers for run, numbers in missing.items() if numbers}
    if not missing:
        return archive
    places = Places(threads=max(run.threads for run in missing), ray=ray)
    folders = [run.folder for run in missing if run.folder]
    if problems := places.problems(folders[0], folders):
        raise RefusedInput(problems)
    count = sum(map(len, missing.values()))
    units = {run: archive.unit_seconds(run.method) for run in missing}
    seconds = sum(_estimate_seconds(run, numbers, units[run]) for run, numbers in missing.items())
    runs = {str(run.folder): run for run in missing}
    remaining = len(runs)
    with places.connected(), interrupting_signals(), start_pool(places, remaining) as pool:
        time_left = format_duration(seconds / places.count)
        notify(f"{count} checkpoints of {len(missing)} runs to rescore, about {time_left}")
        for run, numbers in missing.items():
            pool.submit(_task(run, numbers))
        for event in pool.events():
            if event and event.kind in ENDS:
                remaining -= 1
                rescored, name = event.kind == "done", runs[event.task].name
                reason = event.facts.get("reason", event.kind)
                notify(f"{name} rescored, {remaining} runs left" if rescored else f"{name}: {reason}")
    return replace(archive, rescored={**archive.rescored, **load_rescored(missing)})


def run_task(argument: str, report: Callable[..., None]) -> dict[str, Any]:
    """Rescore the steps that a task names in JSON, {"folder", "steps"}."""
    task = json.loads(argument)
    rescore_steps(task["folder"], task["steps"])
    return {}


def _can_restore(run: RecordedRun) -> bool:
    return run.folder is not None and read_conditions(run.folder) is not None


def _missing_steps(archive: RecordingArchive, run: RecordedRun, steps: Iterable[int]) -> list[int]:
    rescored = archive.rescored.get(run.name)
    complete = rescored.steps.tolist() if rescored and rescored.image_count == run.image_count else ()
    return sorted(set(steps) - set(complete))


def _estimate_seconds(run: RecordedRun, steps: Iterable[int], units: Mapping[str, float]) -> float:
    """Return the seconds of rescoring: images, and on average half of the way from a checkpoint to the next."""
    assert run.folder
    images = 2 * run.image_count * units.get("picture", 0.0)
    training = run.cap / CHECKPOINTS / 2 * units.get("train", 0.0)
    return units.get("start_up", 0.0) + sum(
        images + (0 if weights_path(run.folder, step).exists() else training) for step in steps
    )


def _task(run: RecordedRun, steps: list[int]) -> WorkerTask:
    assert run.folder
    argument = json.dumps({"folder": str(run.folder), "steps": steps})
    return WorkerTask(str(run.folder), "dvar.recordings.rescore", argument, run.folder / LOG, run.threads)


def _spec_of(folder: Path, run: TrainingRun) -> RecordingSpec:
    """Return a specification with the judges and references of a recorded run."""
    judged = (read_conditions(folder) or {})["judged"]
    images = Path(run.config.instance_data_dir or "")
    return RecordingSpec(
        method=run.config.method,
        concept=folder.parent.name,
        model=run.config.pretrained_model_name_or_path,
        concepts=None if images == mini.concepts().get(folder.parent.name) else str(images.parent),
        clip=judged["clip"],
        dino=judged["dino"],
        lpips=judged.get("lpips"),
        pairing=judged["pairing"],
    )


if __name__ == "__main__":
    sys.exit(serve(run_task))
