"""The checkpoints that ways to end a run keep, drawn and scored anew on fresh seeds, for all ways alike.

A way that looks at pictures keeps the step whose pictures looked best, partly by luck; and most ways end between steps
that were scored.  So the model of each kept step is had back (`dvar.recordings.restore`), draws as many pictures as
the record's steps have, of seeds that no choice has seen, and leaves their scores in the run's rescored.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dvar import mini
from dvar.errors import DvarError
from dvar.files import write_json
from dvar.recordings.archive import DONE, RESCORED, RecordedRun, RecordingArchive, RescoredRun, rescored
from dvar.recordings.protocol import CHECKPOINTS, ScoringPrompts
from dvar.recordings.recorder import alone
from dvar.recordings.restore import ANEW, learned_along, sheet_at, weights_at, write_sheet
from dvar.recordings.score_samples import drawn_and_scored, scorer_of
from dvar.recordings.spec import RecordingSpec, facts_of
from dvar.recordings.worker_pool import WorkerTask, side_by_side, slots
from dvar.training.progress import clock
from dvar.training.run import TrainingRun

FRESH = 10_000
"""What is added to the seeds of a record's own pictures, which are counted from 0."""
PARTS = ("train", "validation")
LOG = "rescore.log"


def rescore(folder: str | Path, steps: Iterable[int]) -> Path:
    """Draw and score these steps of a recorded run, and return the file that holds them and those before.

    It is written after each step, so that what was interrupted goes on.
    Those that were drawn when the record had fewer pictures are drawn again.
    Raises: as `dvar.recordings.restore.learned_along`; ModelError when a judge cannot be had; RefusedInput when
    the run is unfinished or damaged, or another process is at it.
    """
    folder = Path(folder)
    with alone(folder):
        header, done = RecordedRun.open(folder).header, _read(folder / DONE)
        seeds, before = [FRESH + seed for seed in header["seeds"]], RescoredRun.open(folder)
        rows = _read(folder / RESCORED)["rows"] if before and before.count == len(seeds) else []
        shots = {part: ScoringPrompts(header[f"{part}_prompts"], header[f"{part}_texts"], seeds) for part in PARTS}
        there = {row["step"] for row in rows}
        torch.set_num_threads(done.get("threads", 1))
        wanted, score = sorted(set(steps) - there), None
        for step, job in zip(wanted, learned_along(folder, wanted), strict=True):
            score = score or scorer_of(_recording(folder, job), job.concept)
            pictures, scores = drawn_and_scored(job, shots, score, header["sampling_steps"])
            write_sheet(sheet_at(folder, step, ANEW), pictures)
            rows.append({"step": step, **scores})
            write_json(folder / RESCORED, {"header": {"hashes": done["hashes"], "seeds": seeds}, "rows": rows})
    return folder / RESCORED


def with_rescored(
    shelf: RecordingArchive,
    wanted: Mapping[RecordedRun, Collection[int]],
    tell: Callable[[str], None],
    workers: int | None = None,
) -> RecordingArchive:
    """Return the shelf with these steps of its records scored anew, several runs at once; what is there is not made
    again, and what cannot be made is told and left out.

    A record of a file of traces, or that no `dvar record` left, has nothing to draw with.
    """
    missing = {record: _missing(shelf, record, steps) for record, steps in wanted.items() if _drawable(record)}
    missing = {record: steps for record, steps in missing.items() if steps}
    if not missing:
        return shelf
    places, count = slots(workers, max(record.threads for record in missing)), sum(map(len, missing.values()))
    expected = sum(_seconds(record, steps, shelf.units(record.method)) for record, steps in missing.items())
    tell(f"{count} checkpoints of {len(missing)} runs to draw anew, about {clock(expected / len(places))}")
    work = {record: _work(record, steps) for record, steps in missing.items()}
    left = len(missing)
    with closing(side_by_side(work, places)) as working:
        for ended, _ in working:
            for record, reason in ended.items():
                left -= 1
                tell(f"{record.name} drawn anew, {left} runs left" if not reason else f"{record.name}: {reason}")
    return replace(shelf, rescored={**shelf.rescored, **rescored(missing)})


def main() -> int:
    """Make what the first argument says in JSON: {"folder", "steps"}; `with_rescored` starts this as a process."""
    try:
        told = json.loads(sys.argv[1])
        rescore(told["folder"], told["steps"])
    except DvarError as error:
        print(f"dvar: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _drawable(record: RecordedRun) -> bool:
    return record.folder is not None and facts_of(record.folder) is not None


def _missing(shelf: RecordingArchive, record: RecordedRun, steps: Iterable[int]) -> list[int]:
    there = shelf.rescored.get(record.name)
    return sorted(set(steps) - set(there.steps.tolist() if there and there.count == record.count else ()))


def _seconds(record: RecordedRun, steps: Iterable[int], units: Mapping[str, float]) -> float:
    """What it takes: pictures, and for a step that was not kept half of the way between two checkpoints."""
    assert record.folder
    pictures = 2 * record.count * units.get("picture", 0.0)
    trained = record.cap / CHECKPOINTS / 2 * units.get("train", 0.0)
    return units.get("start_up", 0.0) + sum(
        pictures + (0 if weights_at(record.folder, step).exists() else trained) for step in steps
    )


def _work(record: RecordedRun, steps: list[int]) -> WorkerTask:
    assert record.folder
    told = json.dumps({"folder": str(record.folder), "steps": steps})
    return WorkerTask("dvar.recordings.rescore", told, record.folder / LOG, record.threads)


def _recording(folder: Path, job: TrainingRun) -> RecordingSpec:
    """What says who judges the pictures of a recorded run, and by which references."""
    judged = (facts_of(folder) or {})["judged"]
    pictures = Path(job.config.instance_data_dir or "")
    return RecordingSpec(
        method=job.config.method,
        concept=folder.parent.name,
        model=job.config.pretrained_model_name_or_path,
        concepts=None if pictures == mini.concepts().get(folder.parent.name) else str(pictures.parent),
        clip=judged["clip"],
        dino=judged["dino"],
        pairing=judged["pairing"],
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
