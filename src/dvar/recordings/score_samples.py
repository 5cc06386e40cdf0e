"""The pictures that a run is judged by: drawn by its model as it stands, and scored; further rounds afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dvar.diffusion.clip import Clip
from dvar.diffusion.sampling import sample
from dvar.files import write_json
from dvar.recordings.archive import DONE, ROUNDS, rounds
from dvar.recordings.image_metrics import Dino, Judge, Scorer
from dvar.recordings.protocol import PROTOCOLS, ScoringPrompts
from dvar.recordings.restore import learned_along
from dvar.recordings.spec import RecordingSpec, shots
from dvar.training.dataset import Concept
from dvar.training.run import TrainingRun


def scorer_of(recording: RecordingSpec, concept: Concept) -> Scorer:
    """Return what scores the pictures of a recording.

    References are read from their files, as the CLIP's own processor wants them, not as training crops them.
    Raises: ModelError and RefusedInput when a judge cannot be had.
    """
    references = []
    for name in concept.names:
        with Image.open(recording.pictures / name) as picture:
            references.append(picture.convert("RGB"))
    return Scorer(
        Clip.load(recording.clip) if recording.clip else Clip.scoring(),
        references,
        pairing=recording.pairing,
        dino=Dino.load(recording.dino) if recording.dino else None,
        judge=Judge(recording.concept) if recording.bundled else None,
    )


def drawn_and_scored(
    job: TrainingRun, wanted: Mapping[str, ScoringPrompts], score: Scorer, steps: int
) -> tuple[list[list[Image.Image]], dict[str, Any]]:
    """Return the pictures of each kind by a job's model as it stands, and their scores by kind, with the "seconds" that
    drawing took.
    """
    started = time.perf_counter()
    pictures = {part: drawn(job, shot.prompts, shot.seeds, steps) for part, shot in wanted.items()}
    seconds = time.perf_counter() - started
    scores = {part: score(pictures[part], shot.texts, shot.places) for part, shot in wanted.items()}
    return list(pictures.values()), {"seconds": seconds, **scores}


def drawn(job: TrainingRun, prompts: Sequence[str], seeds: Sequence[int], steps: int) -> list[Image.Image]:
    """Return the pictures of these prompts by a job's model as it stands, in so many sampling steps."""
    config = job.config
    return sample(
        job.backbone,
        prompts,
        seeds,
        size=config.resolution,
        steps=steps,
        guidance=config.guidance_scale,
        scheduler=config.validation_scheduler,
    )


def lacking(recording: RecordingSpec) -> dict[int, list[int]]:
    """Return, of a finished run, the rounds of pictures after the first that its plan asks for and that are not there:
    the step to their numbers.
    """
    there = rounds(recording.folder)
    found = {
        step: [number for number in range(1, PROTOCOLS[recording.plan].rounds) if (step, number) not in there]
        for step in recording.scored
    }
    return {step: numbers for step, numbers in found.items() if numbers}


def add_rounds(recording: RecordingSpec, concept: Concept, scorer: Scorer) -> None:
    """Draw and score what is `lacking`, leaving it in the folder step by step."""
    folder, wanted, missing = recording.folder, shots(recording, concept), lacking(recording)
    rows = list(rounds(folder).values())
    hashes = json.loads((folder / DONE).read_text(encoding="utf-8"))["hashes"]
    for step, job in zip(missing, learned_along(folder, list(missing)) if missing else (), strict=True):
        steps = PROTOCOLS[recording.plan].sampling_steps or job.config.num_inference_steps
        for number in missing[step]:
            again = {part: shot.again(number) for part, shot in wanted.items()}
            rows.append({"step": step, "round": number, **drawn_and_scored(job, again, scorer, steps)[1]})
        write_json(folder / ROUNDS, {"header": {"hashes": hashes}, "rows": rows})
