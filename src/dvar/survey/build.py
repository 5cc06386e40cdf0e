"""A survey, built from run folders: pairs of pictures, controls with an obvious answer, a training round."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import product
from pathlib import Path
from zlib import crc32

from PIL import Image

from dvar.config.training import Sampler
from dvar.errors import RefusedInput
from dvar.runs.generate import GeneratedImage, draw, drawings
from dvar.runs.run_folder import RunFolder
from dvar.survey.config import SurveyBuildConfig
from dvar.survey.questions import LESSONS
from dvar.survey.survey import PICTURES, QUESTIONS, Survey, Task, controls, key
from dvar.training.dataset import prompts

SHOWN = 4  # reference pictures beside a question
SMALL = 128  # pictures up to this side are enlarged, pixel by pixel, so that every screen shows them alike
ENLARGED = 4
TILES = 4  # the broken picture of a control is cut into this many rows and columns
PADDING = b"paDd"  # a chunk of our own; its small letters tell readers that they may skip it
PNG_END = 12  # bytes of a PNG's last chunk
KEPT = 7 / 8  # of a picture's width and height stay in a control, so that its pictures are in no other task
# Places that a first-time reader sees before them, and that the bundled model knows as well.
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


@dataclass(frozen=True)
class RunPair:
    """Two finished runs of one concept whose pictures are compared."""

    method: str
    concept: str
    candidate: RunFolder
    baseline: RunFolder

    @property
    def likeness(self) -> str:
        """What tells the concept from another of the same name."""
        return _likeness(self.candidate)


def build(runs: Sequence[str | Path], config: SurveyBuildConfig) -> Survey:
    """Return the survey of these runs, written into ``config.output_dir``.

    Runs of one method and one concept (equal reference pictures) are rivals: the one named first is the candidate.
    Their pictures of equal prompt, seed, steps and guidance make a pair; a prompt that training saw asks about
    likeness, any other about the description. What is missing is drawn first, unless ``config.draw`` is off.

    Raises: RefusedInput, before anything is drawn, naming every run that is unfinished, alone or without references,
    and an output folder in use.
    """
    output = Path(config.output_dir)
    if output.exists() and any(output.iterdir()):
        raise RefusedInput([f"{output} holds files already: name another --output_dir, or remove it"])
    found = rivals([RunFolder.open(folder) for folder in runs])
    if config.draw:
        for pair in found:
            for run in (pair.candidate, pair.baseline):
                _draw_missing(run, config)
    staged = output.with_name(f".{output.name}.part")
    shutil.rmtree(staged, ignore_errors=True)
    (staged / PICTURES).mkdir(parents=True)
    survey = _planned(found, ImageStore(staged / PICTURES), config)
    _equally_long(staged / PICTURES)
    survey.write(staged)
    if output.exists():
        output.rmdir()
    staged.replace(output)
    return survey


def rivals(runs: Sequence[RunFolder]) -> tuple[RunPair, ...]:
    """Return the runs two by two, in the order given.

    Two runs of one concept are rivals, too, when they are the only ones of it and of different methods.

    Raises: RefusedInput naming every run that cannot be compared.
    """
    problems, concepts = [], dict[str, list[RunFolder]]()
    for run in runs:
        if run.result is None:
            problems.append(f"a survey compares finished runs, {run.folder} has no result.json: finish it first")
        elif not run.references:
            problems.append(f"a survey shows reference pictures, {run.folder} has none: train it again")
        else:
            concepts.setdefault(_likeness(run), []).append(run)
    found = []
    names = dict[str, str]()
    for likeness, same in concepts.items():
        name = Path(same[0].config["instance_data_dir"] or same[0].folder).name
        name = name if names.setdefault(name, likeness) == likeness else f"{name} {likeness[:4]}"
        methods = dict[str, list[RunFolder]]()
        for run in same:
            methods.setdefault(run.settings.method, []).append(run)
        groups = {" against ".join(methods): same} if len(same) == 2 else methods
        for method, group in groups.items():
            if len(group) == 2:
                found.append(RunPair(method, name, *group))
            else:
                named = ", ".join(str(run.folder) for run in group)
                said = f"two runs of a method and a concept are compared, {method} has {len(group)} here ({named})"
                problems.append(f"{said}: name its rival, of the same pictures, or leave it out")
    if problems or not found:
        raise RefusedInput(problems or ["a survey compares two runs of one concept, got none: name them"])
    return tuple(found)


class ImageStore:
    """The pictures of a survey, encoded anew under names that only their pixels decide."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.enlarged = set[str]()

    def keep(self, picture: Image.Image) -> str:
        """Return the id of a picture, written as a plain RGB PNG without any note of its origin."""
        plain = picture.convert("RGB")
        if small := max(plain.size) <= SMALL:
            plain = plain.resize((plain.width * ENLARGED, plain.height * ENLARGED), Image.Resampling.NEAREST)
        digest = blake2b(repr(plain.size).encode() + plain.tobytes(), digest_size=12)
        plain = Image.frombytes("RGB", plain.size, plain.tobytes())
        path = self.folder / f"{digest.hexdigest()}.png"
        if not path.exists():
            plain.save(path, "PNG")
        if small:
            self.enlarged.add(path.stem)
        return path.stem

    def picture(self, name: str) -> Image.Image:
        """Return the picture of an id, in the size it was given in."""
        kept = _opened(self.folder / f"{name}.png")
        return kept.reduce(ENLARGED) if name in self.enlarged else kept


def _planned(found: Sequence[RunPair], album: ImageStore, config: SurveyBuildConfig) -> Survey:
    pairs = list[Task]()
    for pair in found:
        tasks = _pairs(pair, album)
        if not tasks:
            said = f"{pair.candidate.folder} and {pair.baseline.folder} have no picture of the same prompt and seed"
            raise RefusedInput([f"{said}, steps and guidance: draw some with dvar generate, or leave out --no-draw"])
        pairs += tasks
    others = list[Task]()
    for question in QUESTIONS:
        asked = [task for task in pairs if task.question == question]
        if asked:
            others += _training(asked, album)
            others += _controls(asked, album, config)
    return Survey(
        candidate=config.candidate,
        baseline=config.baseline,
        overlap=config.overlap,
        per_person=config.per_person,
        control_every=config.control_every,
        seed=config.seed,
        tasks=(*others, *pairs),
        runs=tuple(
            {
                "method": pair.method,
                "concept": pair.concept,
                "candidate": str(pair.candidate.folder),
                "baseline": str(pair.baseline.folder),
            }
            for pair in found
        ),
    )


def _pairs(pair: RunPair, album: ImageStore) -> list[Task]:
    """What both rivals drew alike, a task each."""
    ours, theirs = _alike(pair.candidate), _alike(pair.baseline)
    seen = {_pattern(prompt, run) for run in (pair.candidate, pair.baseline) for prompt in prompts(run.settings)}
    references = tuple(album.keep(_opened(path)) for path in pair.candidate.references[:SHOWN])
    tasks = []
    for same in [same for same in ours if same in theirs]:
        pattern, seed, *_ = same
        first, second = _level(_opened(ours[same].path), _opened(theirs[same].path))
        tasks.append(
            Task(
                id=_name(pair.method, pair.likeness, *same),
                question="reconstruction" if pattern in seen else "customization",
                role="pair",
                method=pair.method,
                concept=pair.concept,
                prompt=pattern,
                seed=seed,
                references=references,
                first=album.keep(first),
                second=album.keep(second),
            )
        )
    return tasks


def _training(asked: Sequence[Task], album: ImageStore) -> Iterator[Task]:
    """The training round of a question: one picture in pieces, the same picture twice, and another object if any."""
    broken = replace(_broken(asked[0], 0, album), role="training", lesson=LESSONS["broken"])
    yield replace(broken, id=_name("training", broken.id))
    same = replace(asked[len(asked) // 2], role="training", expected="equal", lesson=LESSONS["same"])
    yield replace(same, id=_name("same", same.id), second=same.first)
    another = next((task for task in asked if task.references != asked[0].references), None)
    if another and asked[0].question == "reconstruction":
        other = replace(asked[0], role="training", expected="first", lesson=LESSONS["other"])
        yield replace(other, id=_name("other", other.id), first=other.references[-1], second=another.references[-1])


def _controls(asked: Sequence[Task], album: ImageStore, config: SurveyBuildConfig) -> Iterator[Task]:
    """As many controls as one person can meet, spread over the pairs."""
    wanted = controls(min(config.per_person, len(asked)), config.control_every)
    for number in range(wanted):
        yield _broken(asked[number * len(asked) // wanted], number + 1, album)


def _broken(task: Task, number: int, album: ImageStore) -> Task:
    """A control: a picture of the pair, or of the object where likeness is asked, against that picture in pieces.

    Either is a cutting of its own, so that no picture of a control is in another task, and none has the other's pixels.
    """
    source = task.references[number % len(task.references)] if task.question == "reconstruction" else task.first
    whole, other = _cuttings(album.picture(source), number, key(0, source))
    return replace(
        task,
        id=_name("control", task.id, number),
        role="control",
        first=album.keep(whole),
        second=album.keep(_in_pieces(other, number)),
        expected="first",
    )


def _name(*parts: object) -> str:
    """The id of a task, of which nothing can be read."""
    return f"{key(0, *parts):016x}"


def _cuttings(picture: Image.Image, number: int, seed: int) -> Iterator[Image.Image]:
    """Two parts of the picture, in its size; another ``number`` gives others."""
    wide, high = round(picture.width * KEPT), round(picture.height * KEPT)
    corners = list(product(range(picture.width - wide + 1), range(picture.height - high + 1)))
    random.Random(seed).shuffle(corners)
    for at in (2 * number, 2 * number + 1):
        left, top = corners[at % len(corners)]
        part = picture.crop((left, top, left + wide, top + high))
        yield part.resize(picture.size, Image.Resampling.BICUBIC)


def _in_pieces(picture: Image.Image, number: int) -> Image.Image:
    """The picture cut into squares that have all changed places."""
    wide, high = picture.width // TILES, picture.height // TILES
    corners = [(column * wide, row * high) for row in range(TILES) for column in range(TILES)]
    order = list(corners)
    random.Random(number).shuffle(order)
    moved = picture.copy()
    for at, source in zip(order, order[1:] + order[:1], strict=True):
        moved.paste(picture.crop((*source, source[0] + wide, source[1] + high)), at)
    return moved


def _equally_long(folder: Path) -> None:
    """Pad every PNG of a folder to one length, in a chunk that readers skip, so that no length tells what is shown."""
    paths = sorted(folder.iterdir())
    longest = max(path.stat().st_size for path in paths)
    for path in paths:
        content = path.read_bytes()
        chunk = PADDING + random.Random(key(0, path.stem)).randbytes(longest - len(content))
        framed = (len(chunk) - len(PADDING)).to_bytes(4, "big") + chunk + crc32(chunk).to_bytes(4, "big")
        path.write_bytes(content[:-PNG_END] + framed + content[-PNG_END:])


def _level(first: Image.Image, second: Image.Image) -> tuple[Image.Image, Image.Image]:
    """Both pictures at the smaller size of the two, so that a size never tells who drew which."""
    size = min(first.size, second.size)
    return (
        first if first.size == size else first.resize(size, Image.Resampling.LANCZOS),
        second if second.size == size else second.resize(size, Image.Resampling.LANCZOS),
    )


def _draw_missing(run: RunFolder, config: SurveyBuildConfig) -> None:
    """Draw the run's plain prompt and the scenes, each at every seed, where it has not."""
    there = {(drawing.prompt, drawing.seed) for drawing in drawings(run)}
    plain = run.settings.plain_prompt
    wanted = [
        (prompt, seed)
        for prompt in (plain, *(f"{plain} {scene}" for scene in _scenes(config)))
        for seed in range(config.pictures_per_prompt)
        if (prompt, seed) not in there
    ]
    if wanted:
        draw(run, [prompt for prompt, _ in wanted], [seed for _, seed in wanted])


def _scenes(config: SurveyBuildConfig) -> Sequence[str]:
    if config.scenes is None:
        return SCENES
    try:
        lines = Path(config.scenes).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedInput([f"scenes must be a text file, {config.scenes} is not ({error}): check --scenes"]) from error
    return [line.strip() for line in lines if line.strip()]


def _alike(run: RunFolder) -> Mapping[tuple[str, int, tuple[int, float, Sampler]], GeneratedImage]:
    """What a run drew by all that must be equal in a pair; of two alike the first."""
    found = dict[tuple[str, int, tuple[int, float, Sampler]], GeneratedImage]()
    for drawing in drawings(run):
        found.setdefault((_pattern(drawing.prompt, run), drawing.seed, drawing.manner), drawing)
    return found


def _pattern(prompt: str, run: RunFolder) -> str:
    """The prompt with {} in place of what it calls the subject."""
    return prompt.replace(run.settings.subject, "{}")


def _likeness(run: RunFolder) -> str:
    """What tells one concept from another: the pixels of its reference pictures, in any order."""
    pixels = sorted(blake2b(_opened(path).tobytes()).hexdigest() for path in run.references)
    return blake2b("".join(pixels).encode()).hexdigest()


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise RefusedInput([f"{path} must be a picture, and cannot be read ({error}): restore it"]) from error
