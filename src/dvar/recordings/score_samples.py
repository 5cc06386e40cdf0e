"""Generation and scoring of the images of recorded runs, further rounds of them included."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from dvar.diffusion.clip import Clip
from dvar.diffusion.sampling import sample
from dvar.files import read_json, write_json
from dvar.recordings.concepts import read_prompts
from dvar.recordings.image_metrics import Dino, Judge, Scorer
from dvar.recordings.lpips import Lpips
from dvar.recordings.protocol import PLACES, PROTOCOLS, ScoringPrompts
from dvar.recordings.recorded_run import DONE, ROUNDS, read_rounds
from dvar.recordings.restore import restore_runs
from dvar.recordings.spec import RecordingSpec
from dvar.training.dataset import Concept, open_image
from dvar.training.run import TrainingRun


def load_scorer(spec: RecordingSpec, concept: Concept) -> Scorer:
    """Return what scores the images of a recording.

    The references are the images as CLIP's own processor wants them, upright and on white as training has them, but not
    the squares that training crops.

    Raises:
        ModelError, RefusedInput: A judge cannot be loaded.
    """
    return Scorer(
        Clip.load(spec.clip) if spec.clip else Clip.scoring(),
        [open_image(path) for path in spec.reference_paths(concept)],
        pairing=spec.pairing,
        dino=Dino.load(spec.dino) if spec.dino else None,
        judge=Judge(spec.concept) if spec.bundled else None,
        lpips=Lpips.load(spec.lpips) if spec.lpips else None,
    )


def scoring_prompts(spec: RecordingSpec, concept: Concept) -> dict[str, ScoringPrompts]:
    """Return the scoring prompts by part: training prompts, evenly from the run's captions, and validation prompts.

    Source: Section 4.1: 8 samples of prompts used in training, and prompts that training never saw.
    Deviates: the paper's validation prompts go with its concepts, as those in a concept's own file do; where there are
        none they are `PLACES`, the same for every concept.
    """
    config, protocol = spec.config, PROTOCOLS[spec.protocol]
    captions = list(dict.fromkeys(text for index in range(len(concept.images)) for text in concept.texts(index)))
    seen = [captions[index * len(captions) // protocol.prompts] for index in range(protocol.prompts)]
    train = ScoringPrompts.for_prompts(seen, config.subject, spec.noun, protocol.seeds)
    if own := read_prompts(spec.image_folder):
        unseen = [own[index % len(own)].replace("{}", config.subject) for index in range(protocol.prompts)]
        validation = ScoringPrompts.for_prompts(unseen, config.subject, spec.noun, protocol.seeds)
    else:
        places = list(PLACES)[: protocol.prompts]
        unseen = [f"a photo of the {config.subject} {PLACES[place]}" for place in places]
        validation = ScoringPrompts.for_prompts(unseen, config.subject, spec.noun, protocol.seeds, places)
    return {"train": train, "validation": validation}


def generate_and_score(
    run: TrainingRun, prompts: Mapping[str, ScoringPrompts], scorer: Scorer, sampling_steps: int
) -> tuple[list[list[Image.Image]], dict[str, Any]]:
    """Generate images by a run's model as it is now, and score them.

    Returns:
        The images of each part, and a dict of their scores by part with the "seconds" that generating them took.
    """
    start = time.perf_counter()
    images = {part: generate_images(run, of.prompts, of.seeds, sampling_steps) for part, of in prompts.items()}
    seconds = time.perf_counter() - start
    scores = {part: scorer(images[part], of.texts, of.places) for part, of in prompts.items()}
    return list(images.values()), {"seconds": seconds, **scores}


def generate_images(
    run: TrainingRun, prompts: Sequence[str], seeds: Sequence[int], sampling_steps: int
) -> list[Image.Image]:
    """Return an image of each prompt from its seed, by a run's model as it is now."""
    config = run.config
    return sample(
        run.backbone,
        prompts,
        seeds,
        size=config.resolution,
        steps=sampling_steps,
        guidance=config.guidance_scale,
        scheduler=config.validation_scheduler,
    )


def find_missing_rounds(spec: RecordingSpec) -> dict[int, list[int]]:
    """Return the rounds of images that a finished recording lacks by its protocol: step to their numbers."""
    rounds = read_rounds(spec.folder)
    numbers = range(1, PROTOCOLS[spec.protocol].rounds)
    missing = {step: [number for number in numbers if (step, number) not in rounds] for step in spec.scored_steps}
    return {step: numbers for step, numbers in missing.items() if numbers}


def score_missing_rounds(spec: RecordingSpec, concept: Concept, scorer: Scorer) -> None:
    """Generate and score the rounds of images that a finished recording lacks, and write them step by step."""
    missing = find_missing_rounds(spec)
    if not missing:
        return
    folder, prompts = spec.folder, scoring_prompts(spec, concept)
    rows = list(read_rounds(folder).values())
    hashes = read_json(folder / DONE)["hashes"]
    for step, run in zip(missing, restore_runs(folder, list(missing)), strict=True):
        sampling_steps = PROTOCOLS[spec.protocol].sampling_steps or run.config.num_inference_steps
        for number in missing[step]:
            round_prompts = {part: of.for_round(number) for part, of in prompts.items()}
            scores = generate_and_score(run, round_prompts, scorer, sampling_steps)[1]
            rows.append({"step": step, "round": number, **scores})
        write_json(folder / ROUNDS, {"header": {"hashes": hashes}, "rows": rows})
