"""What a run is given, read and checked before any model loads: pictures, captions and the new word.

``read_concept`` is the door; it refuses with every problem it can find at once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dvar.config.fields import sound
from dvar.config.training import (
    AnyConfig,
    CustomDiffusionConfig,
    DreamBoothLoraConfig,
    TextualInversionConfig,
    prior_weight,
    settings_problems,
    words,
)
from dvar.errors import ModelError, RefusedInput, nearest
from dvar.training.placeholder_tokens import Tokenizer, word_problems
from dvar.training.preflight import (
    clip_problems,
    model_problems,
    optimizer_problems,
    output_problems,
    process_problems,
    rule_problems,
    tracker_problems,
)

# Deviates: the paper takes published lists of captions; these are our own neutral sentences in their spirit.
TEMPLATES = {
    "object": (
        "a photo of {}",
        "a photo of the {}",
        "a photo of my {}",
        "a photo of one {}",
        "a picture of a {}",
        "a picture of the {}",
        "a picture of my {}",
        "one picture of {}",
        "the photo of a {}",
        "my photo of the {}",
        "a good photo of {}",
        "a good picture of the {}",
        "a nice photo of my {}",
        "a nice picture of one {}",
        "a bright photo of the {}",
        "a bright picture of my {}",
        "a dark photo of {}",
        "a dark picture of the {}",
        "a clean photo of my {}",
        "a close-up photo of {}",
        "a close-up picture of the {}",
        "a cropped photo of a {}",
        "a photo of the small {}",
        "a photo of the large {}",
        "a picture of a nice {}",
        "a picture of the clean {}",
        "a rendering of {}",
    ),
    "style": (
        "a picture in the style of {}",
        "a painting in the style of {}",
        "a drawing in the style of {}",
        "a rendering in the style of {}",
        "a good picture in the style of {}",
        "a nice painting in the style of {}",
        "a bright painting in the style of {}",
        "a dark painting in the style of {}",
        "a small picture in the style of {}",
        "a large painting in the style of {}",
        "a close-up picture in the style of {}",
        "the picture in the style of {}",
    ),
}
# Files that an operating system or the bundled concepts leave beside pictures.
_PASSED_OVER = {"Thumbs.db", "desktop.ini", "concept.json"}
_METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class ClassImages:
    """A class of subjects, for prior preservation: the caption of its pictures, and those that were given, squares."""

    prompt: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Concept:
    """The subject of a run, or its several subjects.

    ``pictures`` are upright RGB squares, ``resolution`` pixels a side, in the order of ``names``; ``captions`` holds
    for each its own caption or None; ``prompts`` are the sentences for those without.  ``words`` are the new ones, none
    where no word is learned; ``classes`` are there for a prior alone.
    """

    pictures: tuple[Image.Image, ...]
    names: tuple[str, ...]
    captions: tuple[str | None, ...]
    prompts: tuple[str, ...]
    words: tuple[str, ...] = ()
    classes: tuple[ClassImages, ...] = ()

    def texts(self, index: int) -> tuple[str, ...]:
        """The captions that picture ``index`` may be shown with: its own, or those of the run."""
        own = self.captions[index]
        return (own,) if own else self.prompts


@dataclass(frozen=True)
class _Source:
    """Where one subject and its class come from; ``where`` begins what is said of it, ``prompt`` is for its pictures
    alone.
    """

    folder: str | None
    prompt: str | None = None
    class_prompt: str | None = None
    class_folder: str | None = None
    where: str = ""


def read_concept(config: AnyConfig, load_tokenizer: Callable[[str], Tokenizer] | None = None) -> Concept:
    """The concept that ``config`` names, read and checked; torch is not imported for it.

    ``load_tokenizer`` gives a model's tokenizer by the model's name, and is called only when that model's folder is in
    order (`tokenizer_of`); without it the words are not checked.  Warns of a single picture and of pictures that must
    be enlarged.

    Raises: `RefusedInput` with every problem of the settings, the processes, the model's folder, the run's folder, the
    list of subjects, the pictures, their captions and the words.
    """
    well = sound(config)
    model = well.pretrained_model_name_or_path
    wrong_model = model_problems(model)
    sources, wrong_files = _sources(well)
    pictures: dict[str, Image.Image] = {}
    captions: dict[str, str] = {}
    for source in sources:
        shown, texts, wrong_here = _read_folder(source, well)
        pictures |= {source.where + name: picture for name, picture in shown.items()}
        captions |= {source.where + name: text for name in shown if (text := texts.get(name) or source.prompt)}
        wrong_files += wrong_here
    classes, wrong_class = _read_classes(sources, well)
    judged = ("window", "threshold", "probe_every", "max_train_steps")
    # Lists, since nan equals itself in a list alone.
    as_given = [getattr(config, name) for name in judged] == [getattr(well, name) for name in judged]
    wrong_rule = rule_problems(config) if as_given else []
    wrong_output = [*output_problems(well), *tracker_problems(well.report_to)]
    wrong_choice = [*optimizer_problems(well.optimizer), *clip_problems(well.clip_model)]
    wrong = [*settings_problems(config), *process_problems(os.environ), *wrong_rule, *wrong_model, *wrong_choice]
    problems = [*wrong, *wrong_output, *wrong_files, *wrong_class]
    if load_tokenizer and not wrong_model:
        try:
            of_class = {f"{source.where}class_prompt": source.class_prompt for source in sources if source.class_prompt}
            problems += word_problems(well, load_tokenizer(model), {**captions, **of_class})
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise RefusedInput(problems)
    if len(pictures) == 1:
        warnings.warn("one picture only: the word may learn its background too; three to five are better", stacklevel=2)
    return Concept(
        pictures=tuple(pictures.values()),
        names=tuple(pictures),
        captions=tuple(captions.get(name) for name in pictures),
        prompts=prompts(well),
        words=words(well),
        classes=tuple(classes),
    )


def prompts(config: AnyConfig) -> tuple[str, ...]:
    """The captions of pictures that have none of their own.

    Source: the paper trains Textual Inversion and DreamBooth-LoRA on sentences around the new word, without a class
    noun, and Custom Diffusion on one sentence with both; diffusers trains LoRA alone on one sentence of the user's.
    """
    if not isinstance(config, TextualInversionConfig) and (
        config.instance_prompt or isinstance(config, CustomDiffusionConfig)
    ):
        return (config.plain_prompt,)
    return tuple(template.format(config.placeholder_token) for template in TEMPLATES[config.learnable_property])


def read_picture(path: Path, resolution: int, *, crop: bool = True) -> Image.Image:
    """The picture in a file: upright, RGB, ``resolution`` pixels square.

    ``crop`` takes the middle square; without it the whole picture is squeezed.  Transparent parts become white, 16-bit
    greys keep their brightness, and of several frames the first is taken.  Warns when the picture must be enlarged.

    Raises: `RefusedInput` when the file is no picture, is damaged or far too large, or when its shorter side is under
    half the resolution.
    Deviates: the orientation tag is applied and transparency composed, which diffusers' own script does not do.
    """
    if path.is_dir():
        raise RefusedInput([f"{path.name} is a folder: pictures are read from one flat folder, move it away"])
    try:
        # A photograph of 100 megapixels is legitimate; Pillow warns of it, and raises at twice that.
        quiet = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
        with quiet, Image.open(path) as opened:
            picture = _rgb(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError:
        said = f"{path.name} is not a picture that can be read: convert it to PNG or JPEG, or move it away"
        raise RefusedInput([said]) from None
    except Image.DecompressionBombError:
        raise RefusedInput([f"{path.name} has far too many pixels for a photograph: scale it down"]) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them meet
        raise RefusedInput([f"{path.name} is damaged ({error}): replace it or move it away"]) from error
    size, shorter, least = f"{picture.width}x{picture.height} pixels", min(picture.size), resolution // 2
    if shorter < least:
        said = f"{path.name} must be {least} pixels or more on its shorter side at resolution {resolution}, got {size}"
        raise RefusedInput([f"{said}: use a larger picture or a lower resolution"])
    if shorter < resolution:
        warnings.warn(f"{path.name} is {size} and is enlarged to {resolution}", stacklevel=2)
    square = (resolution, resolution)
    if crop:
        return ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
    return picture.resize(square, Image.Resampling.BICUBIC)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        # 257 = 65535 / 255: Pillow's own conversion cuts 16-bit greys off at 255 and leaves white.
        picture = Image.fromarray((np.asarray(picture) // 257).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _sources(config: AnyConfig) -> tuple[list[_Source], list[str]]:
    """(where the subjects of these settings come from, what is wrong with the list of them)."""
    match config:
        case CustomDiffusionConfig() if config.concepts_list:
            return _listed(config, Path(config.concepts_list).expanduser())
        case CustomDiffusionConfig():
            prompt, folder = f"photo of a {config.class_noun}", config.class_data_dir
            return [_Source(config.instance_data_dir, None, prompt, folder)], []
        case DreamBoothLoraConfig():
            return [_Source(config.instance_data_dir, None, config.class_prompt, config.class_data_dir)], []
    return [_Source(config.instance_data_dir)], []


_LISTED = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")


def _listed(config: CustomDiffusionConfig, path: Path) -> tuple[list[_Source], list[str]]:
    """(the subjects in a list of diffusers' format, what is wrong with it)."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        return [], [f"concepts_list {path}: {error.strerror or error}; check the path"]
    except ValueError as error:
        return [], [f"concepts_list {path} is not JSON ({error}): write a list of objects with {', '.join(_LISTED)}"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        return [], [f"concepts_list {path} must be a list of one or more objects: write one for each subject"]
    needed = _LISTED[: 3 if config.prior_loss_weight else 2]
    sources, problems = [], []
    for number, entry in enumerate(entries, start=1):
        where = f"concepts_list, subject {number}: "
        problems += [
            f"{where}unknown key {key!r}, the nearest known one is {nearest(key, _LISTED)}"
            for key in entry
            if key not in _LISTED
        ]
        problems += [
            f"{where}{name} must be text, got {entry.get(name)!r}: give it"
            for name in _LISTED
            if not (isinstance(given := entry.get(name), str) and given.strip()) and (name in needed or given)
        ]
        plain = {name: given for name in _LISTED if isinstance(given := entry.get(name), str) and given.strip()}
        prompt = plain.get("instance_prompt")
        if prompt and not any(word in prompt for word in words(config)):
            said = f"{where}instance_prompt must hold one of the new words {', '.join(words(config))}"
            problems.append(f"{said}, got {prompt!r}: put it in")
        sources.append(
            _Source(
                plain.get("instance_data_dir"), prompt, plain.get("class_prompt"), plain.get("class_data_dir"), where
            )
        )
    missing = [word for word in words(config) if not any(word in (source.prompt or "") for source in sources)]
    if missing and not problems:
        said = f"concepts_list {path} has no instance_prompt with {', '.join(missing)}"
        problems.append(f"{said}: put each new word into the prompt of its subject")
    return sources, problems


def _read_folder(source: _Source, config: AnyConfig) -> tuple[dict[str, Image.Image], dict[str, str], list[str]]:
    """(picture by file name, caption by file name, what is wrong) of the folder of pictures."""
    if not source.folder:
        return {}, {}, []
    folder = Path(source.folder).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        said = f"{source.where}instance_data_dir must be a folder with pictures, and {folder} {what}"
        return {}, {}, [f"{said}: check the path"]
    listed = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    files = [file for file in listed if file.name not in _PASSED_OVER]
    written = [file for file in files if file.suffix.lower() == ".txt" or file.name == _METADATA]
    shown = [file for file in files if file not in written]
    pictures: dict[str, Image.Image] = {}
    problems = [] if shown else [f"instance_data_dir {folder} holds no pictures: put three to five there"]
    for file in shown:
        try:
            pictures[file.name] = read_picture(file, config.resolution, crop=config.center_crop)
        except RefusedInput as refused:
            problems += refused.problems
    captions, wrong = _read_captions(written, [file.name for file in shown], words(config))
    return pictures, captions, [source.where + problem for problem in problems + wrong]


def _read_classes(sources: Sequence[_Source], config: AnyConfig) -> tuple[list[ClassImages], list[str]]:
    """(the classes of the subjects, what is wrong with their folders), where a run has a prior."""
    classes, problems = [], []
    for source in sources if prior_weight(config) else ():
        pictures, wrong = _read_class_pictures(source, config)
        classes.append(ClassImages(str(source.class_prompt), tuple(pictures)))
        problems += wrong
    return classes, problems


def _read_class_pictures(source: _Source, config: AnyConfig) -> tuple[list[Image.Image], list[str]]:
    """(pictures, what is wrong) of the folder of class pictures, where one is named."""
    if not source.class_folder:
        return [], []
    folder, where = Path(source.class_folder).expanduser(), source.where
    if not folder.is_dir():
        return [], [f"{where}class_data_dir must be a folder with pictures of the class, got {folder}: check the path"]
    pictures, problems = [], []
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name in _PASSED_OVER or file.suffix.lower() == ".txt":
            continue
        try:
            pictures.append(read_picture(file, config.resolution, crop=config.center_crop))
        except RefusedInput as refused:
            problems += [f"{where}class_data_dir: {problem}" for problem in refused.problems]
    if not pictures and not problems:
        said = f"{where}class_data_dir {folder} holds no pictures"
        problems = [f"{said}: put some hundred of the class there, or name none"]
    return pictures, problems


def _read_captions(files: Sequence[Path], names: Sequence[str], new: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(caption by the file name of its picture, what is wrong)."""
    captions: dict[str, str] = {}
    problems = []
    for where, name, text in (entry for file in files for entry in _entries(file, names)):
        if isinstance(text, ValueError):
            problems.append(f"{where} {text}")
        elif name not in names:
            problems.append(f"{where} names {name!r}, which is not in the folder: correct or remove it")
        elif new and not any(word in text for word in new):
            said = f"{where} must hold the new word {' or '.join(new)} where the subject is named"
            problems.append(f"{said}, got {text!r}")
        elif captions.setdefault(name, text) != text:
            problems.append(f"{where} is a second caption of {name}: keep one")
    return captions, problems


def _entries(file: Path, names: Sequence[str]) -> Iterator[tuple[str, str, str | ValueError]]:
    """(where it is written, its picture's file name, the caption or what is wrong with it) for each one in a file."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        yield file.name, "", ValueError("cannot be read as UTF-8 text: save it as UTF-8")
        return
    if file.name == _METADATA:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{file.name}, line {number},", *_row(line)
        return
    owners = [name for name in names if Path(name).stem == file.stem]
    if not owners:
        yield file.name, "", ValueError("is the caption of no picture: name it after one, or move it away")
    for name in owners:
        yield file.name, name, text.strip()


def _row(line: str) -> tuple[str, str | ValueError]:
    try:
        row = json.loads(line)
        caption = next(row[key] for key in ("text", "prompt", "caption") if key in row)
        return str(row["file_name"]), str(caption).strip()
    except (ValueError, KeyError, TypeError, StopIteration):
        return "", ValueError('must be {"file_name": ..., "text": ...}, or prompt or caption for text: correct it')
