"""The images of a concept and their captions, read from disk."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dvar.config.training import TrainingConfig
from dvar.errors import RefusedInput, nearest
from dvar.files import check_regular, parse_json, read_json, read_text

# Files that an operating system leaves beside images.
_IGNORED = {"Thumbs.db", "desktop.ini"}
_METADATA = "metadata.jsonl"
# What photographs come in. Pillow opens 40 more, of which some run programs (EPS) or are no images of pixels.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
_WHITE_16 = 65535
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
        images: The instance images, RGB squares of the config's resolution.
        names: What each of them is called in messages.
        captions: The caption of each of them; None where it has those of ``templates``.
        templates: The captions of images that have none of their own.
        placeholder_tokens: The new tokens; none where a method trains without.
        classes: The class of each concept, in a run with a prior.
    """

    images: tuple[Image.Image, ...]
    names: tuple[str, ...]
    captions: tuple[str | None, ...]
    templates: tuple[str, ...]
    placeholder_tokens: tuple[str, ...] = ()
    classes: tuple[ClassImages, ...] = ()

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
    """Where the images of one concept and its class are; ``prefix`` starts the messages about it."""

    folder: str | None
    prompt: str | None = None
    class_prompt: str | None = None
    class_folder: str | None = None
    prefix: str = ""


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
    sources = _read_sources(config, problems)
    for source in sources:
        folder_images, folder_captions = _read_folder(source, config, problems)
        images |= {source.prefix + name: image for name, image in folder_images.items()}
        for name in folder_images:
            if caption := folder_captions.get(name) or source.prompt:
                captions[source.prefix + name] = caption
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
    )
    return concept, problems


def read_image(path: Path, resolution: int, *, crop: bool = True) -> Image.Image:
    """Return the image in a file: upright, RGB, square.

    Transparent parts become white, greys of 16 bits and of floating-point values from 0 to 1 keep their brightness, and
    of several frames the first is taken. An image that must be enlarged is warned of.

    Args:
        path: The file.
        resolution: The side of the square, in pixels.
        crop: Take the middle square; otherwise the whole image is squeezed.

    Raises:
        RefusedInput: The file is not an image in a format that photographs come in, is damaged, fully transparent, far
            too large or of values whose white is not known, or its shorter side is under half the resolution.

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
                image = _to_rgb(upright)
    except RefusedInput:
        raise
    except UnidentifiedImageError:
        message = f"{path.name} is not an image that can be read: convert it to PNG or JPEG, or move it away"
        raise RefusedInput([message]) from None
    except Image.DecompressionBombError:
        raise RefusedInput([f"{path.name} has far too many pixels for a photograph: scale it down"]) from None
    except Exception as error:  # decoders raise whatever a damaged file makes them meet
        raise RefusedInput([f"{path.name} is damaged ({error}): replace it or move it away"]) from error
    size, shorter, least = f"{image.width}x{image.height} pixels", min(image.size), resolution // 2
    if shorter < least:
        message = f"{path.name} must be {least} pixels or more on its shorter side at resolution {resolution}"
        raise RefusedInput([f"{message}, got {size}: use a larger image or a lower resolution"])
    if shorter < resolution:
        warnings.warn(f"{path.name} is {size} and is enlarged to {resolution}", stacklevel=2)
    square = (resolution, resolution)
    if crop:
        return ImageOps.fit(image, square, Image.Resampling.BICUBIC)
    return image.resize(square, Image.Resampling.BICUBIC)


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
            problems.append(f"{prefix}unknown key {key!r}, the nearest known one is {nearest(key, _LIST_KEYS)}")
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


def _read_folder(
    source: _Source, config: TrainingConfig, problems: list[str]
) -> tuple[dict[str, Image.Image], dict[str, str]]:
    """Return the instance images and the captions of a folder by file name, and add its problems to ``problems``."""
    if not source.folder:
        return {}, {}
    folder = Path(source.folder).expanduser()
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "does not exist"
        message = f"{source.prefix}instance_data_dir must be a folder with images, and {folder} {state}"
        problems.append(f"{message}: check the path")
        return {}, {}
    files = _visible_files(folder)
    caption_files = [file for file in files if file.suffix.lower() == ".txt" or file.name == _METADATA]
    image_files = [file for file in files if file not in caption_files]
    images: dict[str, Image.Image] = {}
    if not image_files:
        problems.append(f"{source.prefix}instance_data_dir {folder} holds no images: put three to five there")
    for file in image_files:
        try:
            images[file.name] = read_image(file, config.resolution, crop=config.center_crop)
        except RefusedInput as error:
            problems += [source.prefix + problem for problem in error.problems]
    captions, caption_problems = _read_captions(
        caption_files, [file.name for file in image_files], config.placeholder_tokens
    )
    problems += [source.prefix + problem for problem in caption_problems]
    return images, captions


def _visible_files(folder: Path) -> list[Path]:
    """Return the files of ``folder``, sorted, but for hidden ones and those that belong to no concept."""
    files = (file for file in sorted(folder.iterdir()) if not file.name.startswith("."))
    return [file for file in files if file.name not in _IGNORED]


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
    for file in _visible_files(folder):
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


def _read_captions(
    files: Sequence[Path], names: Sequence[str], placeholder_tokens: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """Return the captions in ``files`` by the file name of their image, and what is wrong with them."""
    captions: dict[str, str] = {}
    problems = []
    for place, name, text in (entry for file in files for entry in _read_entries(file, names)):
        if isinstance(text, ValueError):
            problems.append(f"{place} {text}")
        elif name not in names:
            problems.append(f"{place} names {name!r}, which is not in the folder: correct or remove it")
        elif placeholder_tokens and not any(token in text for token in placeholder_tokens):
            message = f"{place} must contain the placeholder token {' or '.join(placeholder_tokens)}"
            problems.append(f"{message} where the concept is named, got {text!r}")
        elif captions.setdefault(name, text) != text:
            problems.append(f"{place} is a second caption of {name}: keep one")
    return captions, problems


def _read_entries(file: Path, names: Sequence[str]) -> Iterator[tuple[str, str, str | ValueError]]:
    """Yield (place, file name of the image, caption or what is wrong with it) for each caption in a file."""
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
        yield file.name, name, text.strip()


def _parse_row(line: str) -> tuple[str, str | ValueError]:
    """Return (file name of the image, caption or what is wrong with it) of a line of metadata."""
    try:
        row = parse_json(line)
        caption = next(row[key] for key in ("text", "prompt", "caption") if key in row)
        return str(row["file_name"]), str(caption).strip()
    except (ValueError, KeyError, TypeError, StopIteration):
        return "", ValueError('must be {"file_name": ..., "text": ...}, or prompt or caption for text: correct it')
