"""Building a survey from finished runs: pairs of images, controls with an obvious answer, training tasks."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from pathlib import Path
from zlib import crc32

from PIL import Image

from dvar.config.training import Sampler
from dvar.errors import RefusedInput
from dvar.files import read_text, regular_file, staged_folder
from dvar.runs.generate import GeneratedImage, generate_images, list_generated_images
from dvar.runs.run_folder import RunFolder
from dvar.survey.config import SurveyBuildConfig
from dvar.survey.questions import LESSONS
from dvar.survey.survey import IMAGE_FOLDER, QUESTIONS, Survey, Task, count_controls, stable_hash

REFERENCES_SHOWN = 4
SMALL_SIDE = 128  # images up to this side are enlarged pixel by pixel, so that every screen shows them alike
ENLARGEMENT = 4
GRID = 4  # a scrambled image is cut into this many rows and columns
CROP_SHARE = 7 / 8  # of width and height; controls are crops, so that their images are in no other task
PADDING_CHUNK = b"paDd"  # a private PNG chunk; its lower-case letters tell readers that they may skip it
PNG_END_LENGTH = 12  # bytes of the last chunk of a PNG
# Places that are easy to imagine, and that the bundled model knows.
SCENES = (
    "on the beach",
    "in the snow",
    "in the forest",
    "on a table",
    "in the desert",
    "on the grass",
    "at night",
    "on the street",
)
ImageSettings = tuple[str, int, tuple[int, float, Sampler]]  # prompt pattern, seed, and how it was sampled


@dataclass(frozen=True)
class RunPair:
    """Two finished runs of one concept whose images are compared.

    Args:
        method: The method of both runs.
        concept: Name of the concept.
        candidate: The run that was named first.
        baseline: The run that was named second.
    """

    method: str
    concept: str
    candidate: RunFolder
    baseline: RunFolder


def build_survey(runs: Sequence[str | Path], config: SurveyBuildConfig) -> Survey:
    """Build a survey of ``runs`` in ``config.output_dir`` and return it.

    Two runs of one method and one concept are compared; the one named first is the candidate. Two of their images with
    the same prompt, seed, steps, guidance and scheduler form a pair. A pair whose prompt was used in training asks
    about likeness, any other about the description. Missing images are generated first, unless ``config.generate`` is
    off.

    Raises:
        RefusedInput: The output folder is in use, or some runs are unfinished, have no counterpart or have no
            reference images; all such runs are named before any image is generated.
    """
    output = Path(config.output_dir).expanduser()
    if output.exists() and any(output.iterdir()):
        raise RefusedInput([f"{output} already holds files: name another --output_dir, or remove it"])
    pairs = pair_runs([RunFolder.open(folder) for folder in runs])
    with staged_folder(output) as staging:
        if config.generate:
            for pair in pairs:
                for run in (pair.candidate, pair.baseline):
                    _generate_missing(run, pair.candidate, config)
        (staging / IMAGE_FOLDER).mkdir()
        survey = _plan_survey(pairs, ImageStore(staging / IMAGE_FOLDER), config)
        _pad_to_equal_length(staging / IMAGE_FOLDER)
        survey.save(staging)
        if output.exists():
            output.rmdir()  # fails if something has been put into it meanwhile
    return survey


def pair_runs(runs: Sequence[RunFolder]) -> tuple[RunPair, ...]:
    """Return the pairs of runs to compare, in the order of ``runs``.

    Two runs of one concept and one method form a pair. If a concept has only two runs, they form a pair even when
    their methods differ.

    Raises:
        RefusedInput: Some runs cannot be compared; all are named.
    """
    problems, concepts = [], dict[str, list[RunFolder]]()
    for run in runs:
        if run.result is None:
            problems.append(f"a survey compares finished runs, {run.folder} has no result.json: finish it first")
        elif not run.references:
            problems.append(f"a survey shows reference images, {run.folder} has none: train it again")
        else:
            concepts.setdefault(_concept_id(run), []).append(run)
    pairs = []
    names = dict[str, str]()
    for concept_id, concept_runs in concepts.items():
        name = Path(concept_runs[0].config["instance_data_dir"] or concept_runs[0].folder).name
        name = name if names.setdefault(name, concept_id) == concept_id else f"{name} {concept_id[:4]}"
        for method, group in _group_by_method(concept_runs).items():
            if len(group) == 2:
                pairs.append(RunPair(method, name, *group))
            else:
                folders = ", ".join(str(run.folder) for run in group)
                problem = (
                    f"a survey compares two runs of a method and a concept, got {len(group)} of {method} ({folders})"
                )
                problems.append(f"{problem}: name exactly two with the same reference images")
    if problems or not pairs:
        raise RefusedInput(problems or ["a survey compares two runs of one concept, got none: name them"])
    return tuple(pairs)


def _group_by_method(runs: Sequence[RunFolder]) -> Mapping[str, Sequence[RunFolder]]:
    methods = dict[str, list[RunFolder]]()
    for run in runs:
        methods.setdefault(run.settings.method, []).append(run)
    return {" against ".join(methods): runs} if len(runs) == 2 else methods


class ImageStore:
    """The images of a survey, re-encoded under names that depend on their pixels alone.

    Args:
        folder: Folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.enlarged = set[str]()

    def add(self, image: Image.Image) -> str:
        """Write an image as a plain RGB PNG without metadata, and return its id."""
        plain = image.convert("RGB")
        if small := max(plain.size) <= SMALL_SIDE:
            plain = plain.resize((plain.width * ENLARGEMENT, plain.height * ENLARGEMENT), Image.Resampling.NEAREST)
        digest = blake2b(repr(plain.size).encode() + plain.tobytes(), digest_size=12)
        plain = Image.frombytes("RGB", plain.size, plain.tobytes())
        path = self.folder / f"{digest.hexdigest()}.png"
        if not path.exists():
            plain.save(path, "PNG")
        if small:
            self.enlarged.add(path.stem)
        return path.stem

    def load(self, image_id: str) -> Image.Image:
        """Return an image in its original size."""
        image = _open_image(self.folder / f"{image_id}.png")
        return image.reduce(ENLARGEMENT) if image_id in self.enlarged else image


def _plan_survey(pairs: Sequence[RunPair], store: ImageStore, config: SurveyBuildConfig) -> Survey:
    pair_tasks = [task for pair in pairs for task in _pair_tasks(pair, store)]
    other_tasks = list[Task]()
    for question in QUESTIONS:
        tasks = [task for task in pair_tasks if task.question == question]
        if tasks:
            other_tasks += _training_tasks(tasks, store)
            other_tasks += _control_tasks(tasks, store, config)
    return Survey(
        candidate=config.candidate,
        baseline=config.baseline,
        overlap=config.overlap,
        per_person=config.per_person,
        control_every=config.control_every,
        seed=config.seed,
        tasks=(*other_tasks, *pair_tasks),
        runs=tuple(
            {
                "method": pair.method,
                "concept": pair.concept,
                "candidate": str(pair.candidate.folder),
                "baseline": str(pair.baseline.folder),
            }
            for pair in pairs
        ),
    )


def _pair_tasks(pair: RunPair, store: ImageStore) -> list[Task]:
    """Return a task for each two images that were generated with the same settings."""
    candidate_images, baseline_images = _images_by_settings(pair.candidate), _images_by_settings(pair.baseline)
    runs = (pair.candidate, pair.baseline)
    trained_patterns = {_prompt_pattern(prompt, run) for run in runs for prompt in run.settings.caption_templates}
    references = tuple(store.add(_open_image(path)) for path in pair.candidate.references[:REFERENCES_SHOWN])
    concept_id = _concept_id(pair.candidate)
    tasks = []
    for settings in [settings for settings in candidate_images if settings in baseline_images]:
        pattern, seed, _ = settings
        first, second = (_open_image(images[settings].path) for images in (candidate_images, baseline_images))
        first, second = _match_sizes(first, second)
        tasks.append(
            Task(
                id=_task_id(pair.method, concept_id, *settings),
                question="reconstruction" if pattern in trained_patterns else "customization",
                role="pair",
                method=pair.method,
                concept=pair.concept,
                prompt=pattern,
                seed=seed,
                references=references,
                first=store.add(first),
                second=store.add(second),
            )
        )
    if not tasks:
        problem = f"{pair.candidate.folder} and {pair.baseline.folder} have no image of the same prompt and seed"
        raise RefusedInput([f"{problem}, steps and guidance: run dvar generate, or leave out --no_generate"])
    return tasks


def _training_tasks(tasks: Sequence[Task], store: ImageStore) -> Iterator[Task]:
    """Yield the training of a question: a scrambled image, the same image twice, and another object if there is one."""
    broken = replace(_control_task(tasks[0], 0, store), role="training", lesson=LESSONS["broken"])
    yield replace(broken, id=_task_id("training", broken.id))
    same = replace(tasks[len(tasks) // 2], role="training", expected="equal", lesson=LESSONS["same"])
    yield replace(same, id=_task_id("same", same.id), second=same.first)
    another = next((task for task in tasks if task.references != tasks[0].references), None)
    if another and tasks[0].question == "reconstruction":
        other = replace(tasks[0], role="training", expected="first", lesson=LESSONS["other"])
        first, second = other.references[-1], another.references[-1]
        yield replace(other, id=_task_id("other", other.id), first=first, second=second)


def _control_tasks(tasks: Sequence[Task], store: ImageStore, config: SurveyBuildConfig) -> Iterator[Task]:
    """Yield as many controls as one rater can meet, spread over the pairs."""
    count = count_controls(min(config.per_person, len(tasks)), config.control_every)
    for number in range(count):
        yield _control_task(tasks[number * len(tasks) // count], number + 1, store)


def _control_task(task: Task, number: int, store: ImageStore) -> Task:
    """Return a control: an image against a scrambled one, from a reference where likeness is asked.

    Both are crops of their own, so that no image of a control is in another task and the two differ in their pixels.
    """
    source = task.references[number % len(task.references)] if task.question == "reconstruction" else task.first
    intact, other = _crops(store.load(source), number, stable_hash(0, source))
    return replace(
        task,
        id=_task_id("control", task.id, number),
        role="control",
        first=store.add(intact),
        second=store.add(_scramble(other, number)),
        expected="first",
    )


def _task_id(*parts: object) -> str:
    """Return an id that reveals nothing about the task."""
    return f"{stable_hash(0, *parts):016x}"


def _crops(image: Image.Image, number: int, seed: int) -> Iterator[Image.Image]:
    """Yield two crops of an image, resized to its size; each ``number`` gives different ones."""
    width, height = round(image.width * CROP_SHARE), round(image.height * CROP_SHARE)
    corners = list(product(range(image.width - width + 1), range(image.height - height + 1)))
    random.Random(seed).shuffle(corners)
    for index in (2 * number, 2 * number + 1):
        left, top = corners[index % len(corners)]
        crop = image.crop((left, top, left + width, top + height))
        yield crop.resize(image.size, Image.Resampling.BICUBIC)


def _scramble(image: Image.Image, seed: int) -> Image.Image:
    """Return the image cut into tiles, none of which is in its place."""
    width, height = image.width // GRID, image.height // GRID
    corners = [(column * width, row * height) for row in range(GRID) for column in range(GRID)]
    random.Random(seed).shuffle(corners)
    scrambled = image.copy()
    for target, source in zip(corners, corners[1:] + corners[:1], strict=True):
        scrambled.paste(image.crop((*source, source[0] + width, source[1] + height)), target)
    return scrambled


def _pad_to_equal_length(folder: Path) -> None:
    """Pad every PNG of a folder to the same length, so that no length reveals what an image shows."""
    paths = sorted(folder.iterdir())
    longest = max(path.stat().st_size for path in paths)
    for path in paths:
        content = path.read_bytes()
        chunk = PADDING_CHUNK + random.Random(stable_hash(0, path.stem)).randbytes(longest - len(content))
        framed = (len(chunk) - len(PADDING_CHUNK)).to_bytes(4, "big") + chunk + crc32(chunk).to_bytes(4, "big")
        path.write_bytes(content[:-PNG_END_LENGTH] + framed + content[-PNG_END_LENGTH:])


def _match_sizes(first: Image.Image, second: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Return both images at the smaller of the two sizes, so that no size reveals which run is which."""
    size = min(first.size, second.size)
    return (
        first if first.size == size else first.resize(size, Image.Resampling.LANCZOS),
        second if second.size == size else second.resize(size, Image.Resampling.LANCZOS),
    )


def _generate_missing(run: RunFolder, candidate: RunFolder, config: SurveyBuildConfig) -> None:
    """Generate the images of the plain prompt and of each scene that the run does not have yet.

    Both runs of a pair sample as the candidate does, and have its prompts: methods differ in their own.
    """
    settings = candidate.settings
    sampling = settings.num_inference_steps, float(settings.guidance_scale), settings.validation_scheduler
    existing = {(image.prompt, image.seed, image.sampling_settings) for image in list_generated_images(run)}
    plain = _prompt_pattern(settings.plain_prompt, candidate).replace("{}", run.settings.subject)
    missing = [
        (prompt, seed)
        for prompt in (plain, *(f"{plain} {scene}" for scene in _read_scenes(config)))
        for seed in range(config.images_per_prompt)
        if (prompt, seed, sampling) not in existing
    ]
    if missing:
        prompts, seeds = zip(*missing, strict=True)
        steps, guidance, scheduler = sampling
        generate_images(run, prompts, seeds, num_inference_steps=steps, guidance_scale=guidance, scheduler=scheduler)


def _read_scenes(config: SurveyBuildConfig) -> Sequence[str]:
    if config.scenes is None:
        return SCENES
    try:
        lines = read_text(Path(config.scenes)).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"scenes must be a text file, {config.scenes} is not ({error}): check --scenes"]) from error
    return [line.strip() for line in lines if line.strip()]


def _images_by_settings(run: RunFolder) -> Mapping[ImageSettings, GeneratedImage]:
    """Return the images of a run by everything that must be equal in a pair; of two equal ones, the first."""
    images = dict[ImageSettings, GeneratedImage]()
    for image in list_generated_images(run):
        images.setdefault((_prompt_pattern(image.prompt, run), image.seed, image.sampling_settings), image)
    return images


def _prompt_pattern(prompt: str, run: RunFolder) -> str:
    """Return the prompt with {} in place of the subject."""
    return prompt.replace(run.settings.subject, "{}")


def _concept_id(run: RunFolder) -> str:
    """Return a digest of the reference images, in any order: it tells concepts of the same name apart."""
    pixels = sorted(blake2b(_open_image(path).tobytes()).hexdigest() for path in run.references)
    return blake2b("".join(pixels).encode()).hexdigest()


def _open_image(path: Path) -> Image.Image:
    try:
        with Image.open(regular_file(path)) as image:
            return image.convert("RGB")
    except Exception as error:  # decoders raise whatever a damaged file makes them meet
        raise RefusedInput([f"{path} must be an image, and cannot be read ({error}): restore it"]) from error
