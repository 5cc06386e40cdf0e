"""The images of a concept and their captions, read from disk."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dvar.config.buckets import Size, nearest_bucket, valid_buckets
from dvar.config.training import BUNDLED_MODELS, TrainingConfig
from dvar.errors import RefusedInput, suggest
from dvar.files import check_regular, parse_json, read_json, read_text, visible_paths
from dvar.training.photographs import is_photograph

_METADATA = "metadata.jsonl"
# What photographs come in. Pillow opens 40 more, of which some run programs (EPS) or are no images of pixels.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_WHITE_16 = 65535
_REPEATS = re.compile(r"([1-9]\d{0,4})_.")
"""How kohya's scripts name folders: 10_mug."""
_LIST_KEYS = ("instance_prompt", "instance_data_dir", "class_prompt", "class_data_dir")


@dataclass(frozen=True)
class ClassImages:
    """The class of a concept, for prior preservation.

    Attributes:
        prompt: The caption of all its images.
        images: RGB squares of the config's resolution; none where the base model is to generate them.
        name: What the prompt is called in messages.
    """

    prompt: str
    images: tuple[Image.Image, ...] = ()
    name: str = "class_prompt"


@dataclass(frozen=True)
class Concept:
    """The images and captions that a run learns from, be it one concept or several.

    Attributes:
        images: The instance images, RGB, squares of the config's resolution or of the size of their bucket.
        names: What each of them is called in messages.
        captions: The caption of each of them; None where it has those of ``templates``.
        templates: The captions of images that have none of their own.
        placeholder_tokens: The new tokens; none where a method trains without.
        classes: The class of each concept, in a run with a prior.
        repeats: How often each image counts when one is drawn; once if empty.
    """

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    captions: tuple[str | None, ...]
    templates: tuple[str, ...]
    placeholder_tokens: tuple[str, ...] = ()
    classes: tuple[ClassImages, ...] = ()
    repeats: tuple[int, ...] = ()

    def texts(self, index: int) -> tuple[str, ...]:
        """Return the captions that image ``index`` may be shown with."""
        caption = self.captions[index]
        return (caption,) if caption else self.templates

    @property
    def prompts(self) -> dict[str, str]:
        """The captions of single images and of classes, by their names in messages."""
        captions = {name: caption for name, caption in zip(self.names, self.captions, strict=True) if caption}
        return captions | {images.name: images.prompt for images in self.classes}


@dataclass(frozen=True)
class _Source:
    """Where the images of one concept and its class are; ``prefix`` starts the messages about it.

    Each image counts ``repeats`` times.
    """

    folder: str | None
    prompt: str | None = None
    class_prompt: str | None = None
    class_folder: str | None = None
    prefix: str = ""
    repeats: int = 1


@dataclass(frozen=True)
class _Row:
    """What is said of an image: its caption, and how often it counts."""

    caption: str | None
    repeats: int = 1


def read_concept(config: TrainingConfig) -> Concept:
    """Return the concept of ``config``; torch is not imported for it.

    Raises:
        RefusedInput: Images or captions cannot be used; all problems are named.
    """
    concept, problems = scan_concept(config)
    if problems:
        raise RefusedInput(problems)
    return concept


def scan_concept(config: TrainingConfig) -> tuple[Concept, list[str]]:
    """Return the concept of ``config`` as far as it can be read, and every problem with its images and captions.

    A single image and images that must be enlarged are warned of.
    """
    problems: list[str] = []
    images: dict[str, Image.Image] = {}
    captions: dict[str, str] = {}
    repeats: dict[str, int] = {}
    sources = _read_sources(config, problems)
    for source in [part for each in sources for part in _split_by_repeats(each)]:
        folder_images, rows = _read_folder(source, config, problems)
        images |= {source.prefix + name: image for name, image in folder_images.items()}
        for name in folder_images:
            if caption := (rows[name].caption if name in rows else None) or source.prompt:
                captions[source.prefix + name] = caption
            repeats[source.prefix + name] = source.repeats * (rows[name].repeats if name in rows else 1)
    classes = [
        ClassImages(
            str(source.class_prompt),
            tuple(_read_class_images(source, config, problems)),
            f"{source.prefix}class_prompt",
        )
        for source in (sources if config.effective_prior_weight else ())
    ]
    if len(images) == 1 and not problems:
        message = "there is one image only, and its background may be learned too: three to five are better"
        warnings.warn(message, stacklevel=3)
    concept = Concept(
        images=tuple(images.values()),
        names=tuple(images),
        captions=tuple(captions.get(name) for name in images),
        templates=config.caption_templates,
        placeholder_tokens=config.placeholder_tokens,
        classes=tuple(classes),
        repeats=tuple(repeats.values()) if {*repeats.values()} - {1} else (),
    )
    return concept, problems


def read_image(path: Path, resolution: int, *, crop: bool = True, buckets: tuple[Size, ...] = ()) -> Image.Image:
    """Return the image in a file: upright, RGB, square or of the size of the bucket that is most like it.

    An image that must be enlarged is warned of.

    Args:
        path: The file.
        resolution: The side of the square, in pixels.
        crop: Take the middle; otherwise the whole image is squeezed.
        buckets: Sizes to choose from; only the square of ``resolution`` if empty.

    Raises:
        RefusedInput: As `open_image`, or the shorter side of the image is under half the resolution.
    """
    return _fit(open_image(path), path.name, resolution, crop, buckets)


def open_image(path: Path) -> Image.Image:
    """Return the image in a file as it is, upright and RGB.

    Transparent parts become white, greys of 16 bits and of floating-point values from 0 to 1 keep their brightness, and
    of several frames the first is taken.

    Raises:
        RefusedInput: The file is not an image in a format that photographs come in, is damaged, fully transparent, far
            too large or of values whose white is not known.

    Deviates: The orientation tag is applied and transparency is composed, which diffusers' script does not do.
    """
    if path.is_dir():
        raise RefusedInput([f"{path.name} is a folder: images are read from one flat folder, move it away"])
    try:
        check_regular(path)
    except OSError as error:
        raise RefusedInput([f"{path.name} cannot be read ({error.strerror or error}): move it away"]) from error
    try:
        # A photograph of 100 megapixels is legitimate; Pillow warns of it, and raises at twice that.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            Image.init()
            with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as opened:
                upright = ImageOps.exif_transpose(opened)
                if reason := _find_unclear_values(upright):
                    raise RefusedInput([f"{path.name} {reason}: save it as PNG or JPEG with 8 bits, or move it away"])
                return _to_rgb(upright)
    except RefusedInput:
        raise
    except UnidentifiedImageError:
        message = f"{path.name} is not an image that can be read: convert it to PNG or JPEG, or move it away"
        raise RefusedInput([message]) from None
    except Image.DecompressionBombError:
        raise RefusedInput([f"{path.name} has far too many pixels for a photograph: scale it down"]) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them meet
        raise RefusedInput([f"{path.name} is damaged ({error}): replace it or move it away"]) from error


def _fit(image: Image.Image, name: str, resolution: int, crop: bool, buckets: tuple[Size, ...]) -> Image.Image:
    """Return an image in the size that `read_image` describes; messages call it ``name``."""
    height, width = nearest_bucket((image.height, image.width), buckets) if buckets else (resolution, resolution)
    resolution = min(height, width)
    size, shorter, least = f"{image.width}x{image.height} pixels", min(image.size), resolution // 2
    if shorter < least:
        message = f"{name} must be {least} pixels or more on its shorter side at resolution {resolution}"
        raise RefusedInput([f"{message}, got {size}: use a larger image or a lower resolution"])
    if shorter < resolution:
        warnings.warn(f"{name} is {size} and is enlarged to {resolution}", stacklevel=2)
    if crop:
        return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _find_unclear_values(image: Image.Image) -> str | None:
    """Return why nobody can say what an image looks like: it is all transparent, or its white is not known."""
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        least, largest = float(values.min()), float(values.max())
        white = 1 if image.mode == "F" else _WHITE_16
        if not (least >= 0 and largest <= white):  # nor a number
            return f"has values from {least:g} to {largest:g}, and only those from 0 to {white} are understood"
    if image.has_transparency_data and not np.asarray(image.convert("RGBA"))[..., 3].any():
        return "is fully transparent"
    return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return ``image`` in RGB, on white where it is transparent."""
    if image.mode == "F":
        image = Image.fromarray((np.asarray(image) * 255).round().astype(np.uint8))
    if image.mode.startswith("I"):
        # 257 = 65535 / 255: Pillow's own conversion cuts 16-bit greys off at 255 and leaves white.
        image = Image.fromarray((np.asarray(image) // 257).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _read_sources(config: TrainingConfig, problems: list[str]) -> list[_Source]:
    """Return where the concepts of ``config`` are, and add what is wrong with a list of them to ``problems``."""
    if not config.concepts_list:
        return [_Source(config.instance_data_dir, None, config.class_prompt, config.class_data_dir)]
    path = Path(config.concepts_list).expanduser()
    try:
        entries = read_json(path)
    except OSError as error:
        problems.append(f"concepts_list {path}: {error.strerror or error}; check the path")
        return []
    except ValueError as error:
        keys = ", ".join(_LIST_KEYS)
        problems.append(f"concepts_list {path} is not JSON ({error}): write a list of objects with {keys}")
        return []
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        problems.append(f"concepts_list {path} must be a list of one or more objects: write one for each concept")
        return []
    count = len(problems)
    sources = [_parse_entry(entry, number, config, problems) for number, entry in enumerate(entries, start=1)]
    prompts = [source.prompt or "" for source in sources]
    unused = [token for token in config.placeholder_tokens if not any(token in prompt for prompt in prompts)]
    if unused and len(problems) == count:
        message = f"concepts_list {path} has no instance_prompt with {', '.join(unused)}"
        problems.append(f"{message}: put each placeholder token into the prompt of its concept")
    return sources


def _parse_entry(entry: dict[str, Any], number: int, config: TrainingConfig, problems: list[str]) -> _Source:
    """Return one concept of a list in diffusers' format, and add what is wrong with it to ``problems``."""
    prefix = f"concepts_list, concept {number}: "
    required = _LIST_KEYS[: 3 if config.effective_prior_weight else 2]
    texts = {key: value for key in _LIST_KEYS if isinstance(value := entry.get(key), str) and value.strip()}
    for key in entry:
        if key not in _LIST_KEYS:
            problems.append(f"{prefix}unknown key {key!r}: {suggest(key, _LIST_KEYS)}")
    for key in _LIST_KEYS:
        if key not in texts and (key in required or entry.get(key)):
            problems.append(f"{prefix}{key} must be text, got {entry.get(key)!r}: give it")
    prompt = texts.get("instance_prompt")
    if prompt and not any(token in prompt for token in config.placeholder_tokens):
        tokens = ", ".join(config.placeholder_tokens)
        message = f"{prefix}instance_prompt must contain one of the placeholder tokens {tokens}"
        problems.append(f"{message}, got {prompt!r}: put it in")
    return _Source(
        texts.get("instance_data_dir"), prompt, texts.get("class_prompt"), texts.get("class_data_dir"), prefix
    )


def _split_by_repeats(source: _Source) -> list[_Source]:
    """Return the folders in a folder that are named as kohya's, 10_mug with 10 repeats, or the source as it is."""
    folder = Path(source.folder or "").expanduser()
    if not source.folder or not folder.is_dir():
        return [source]
    parts = [(path, _REPEATS.match(path.name)) for path in visible_paths(folder)]
    if not parts or not all(match and path.is_dir() for path, match in parts):
        return [source]
    return [
        replace(source, folder=str(path), prefix=f"{source.prefix}{path.name}/", repeats=int(match[1]))
        for path, match in parts
        if match
    ]


def _read_folder(
    source: _Source, config: TrainingConfig, problems: list[str]
) -> tuple[dict[str, Image.Image], dict[str, _Row]]:
    """Return the instance images and what is said of them by file name, and add its problems to ``problems``."""
    if not source.folder:
        return {}, {}
    folder = Path(source.folder).expanduser()
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        message = f"{source.prefix}instance_data_dir must be a folder with images, and {folder} {state}"
        problems.append(f"{message}: check the path")
        return {}, {}
    files = visible_paths(folder)
    caption_files = [file for file in files if file.suffix.lower() == ".txt" or file.name == _METADATA]
    image_files = [file for file in files if file not in caption_files]
    images: dict[str, Image.Image] = {}
    buckets = valid_buckets(config.aspect_ratio_buckets, config.resolution)
    if not image_files:
        problems.append(f"{source.prefix}instance_data_dir {folder} holds no images: put three to five there")
    photographs = 0
    for file in image_files:
        try:
            image = open_image(file)
            images[file.name] = _fit(image, file.name, config.resolution, config.center_crop, buckets)
        except RefusedInput as error:
            problems += [source.prefix + problem for problem in error.problems]
            continue
        photographs += config.pretrained_model_name_or_path in BUNDLED_MODELS and is_photograph(image)
    if 2 * photographs > len(images):
        message = f"{folder} seems to hold photographs, and {config.pretrained_model_name_or_path} knows nothing but a"
        remedy = "name a model of photographs by --pretrained_model_name_or_path, or concepts that dvar concepts lists"
        warnings.warn(f"{message} picture book of 64 x 64 pixels, so it cannot learn them: {remedy}", stacklevel=4)
    rows, caption_problems = _read_rows(caption_files, [file.name for file in image_files], config.placeholder_tokens)
    problems += [source.prefix + problem for problem in caption_problems]
    return images, rows


def _read_class_images(source: _Source, config: TrainingConfig, problems: list[str]) -> list[Image.Image]:
    """Return the class images of the folder that ``source`` names, if any, and add its problems to ``problems``."""
    if not source.class_folder:
        return []
    folder, count = Path(source.class_folder).expanduser(), len(problems)
    if not folder.is_dir():
        message = f"{source.prefix}class_data_dir must be a folder with class images, got {folder}"
        problems.append(f"{message}: check the path")
        return []
    images = []
    for file in visible_paths(folder):
        if file.suffix.lower() == ".txt":
            continue
        try:
            images.append(read_image(file, config.resolution, crop=config.center_crop))
        except RefusedInput as error:
            problems += [f"{source.prefix}class_data_dir: {problem}" for problem in error.problems]
    if not images and len(problems) == count:
        message = f"{source.prefix}class_data_dir {folder} holds no images"
        problems.append(f"{message}: put some hundred of the class there, or name no folder")
    return images


def _read_rows(
    files: Sequence[Path], names: Sequence[str], placeholder_tokens: Sequence[str]
) -> tuple[dict[str, _Row], list[str]]:
    """Return what ``files`` say of images, by the file name of the image, and what is wrong with them."""
    rows: dict[str, _Row] = {}
    problems = []
    for place, name, row in (entry for file in files for entry in _read_entries(file, names)):
        if isinstance(row, ValueError):
            problems.append(f"{place} {row}")
        elif name not in names:
            problems.append(f"{place} names {name!r}, which is not in the folder: correct or remove it")
        elif (
            placeholder_tokens
            and row.caption is not None
            and not any(part in row.caption for part in placeholder_tokens)
        ):
            message = f"{place} must contain the placeholder token {' or '.join(placeholder_tokens)}"
            problems.append(f"{message} where the concept is named, got {row.caption!r}")
        elif name not in rows:
            rows[name] = row
        elif None not in (row.caption, rows[name].caption) and row.caption != rows[name].caption:
            problems.append(f"{place} is a second caption of {name}: keep one")
        else:
            other = rows[name]
            rows[name] = _Row(row.caption or other.caption, max(row.repeats, other.repeats))
    return rows, problems


def _read_entries(file: Path, names: Sequence[str]) -> Iterator[tuple[str, str, _Row | ValueError]]:
    """Yield (place, file name of the image, what is said of it or what is wrong with that) for each entry of a file."""
    try:
        text = read_text(file, "utf-8-sig")
    except (OSError, UnicodeDecodeError):
        yield file.name, "", ValueError("cannot be read as UTF-8 text: save it as UTF-8")
        return
    if file.name == _METADATA:
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield f"{file.name}, line {number},", *_parse_row(line)
        return
    owners = [name for name in names if Path(name).stem == file.stem]
    if not owners:
        yield file.name, "", ValueError("is the caption of no image: name it after one, or move it away")
    for name in owners:
        yield file.name, name, _Row(text.strip())


def _parse_row(line: str) -> tuple[str, _Row | ValueError]:
    """Return (file name of the image, what is said of it or what is wrong with that) of a line of metadata."""
    try:
        row = parse_json(line)
        name, repeats = str(row["file_name"]), row.get("repeats", 1)
        caption = next((str(row[key]).strip() for key in ("text", "prompt", "caption") if key in row), None)
    except (ValueError, KeyError, TypeError, AttributeError):
        name, repeats, caption = "", None, None
    if not name or (caption is None and repeats == 1):
        message = 'must be {"file_name": ..., "text": ...}, or prompt or caption for text, or "repeats": correct it'
        return "", ValueError(message)
    if type(repeats) is not int or repeats < 1:
        return "", ValueError(f"must have repeats that are a whole number from 1, got {repeats!r}: correct it")
    return name, _Row(caption, repeats)
