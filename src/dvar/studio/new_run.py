"""A new run: its config from the form, what preflight says of it, what it will cost, and its start."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dvar.config.buckets import valid_buckets
from dvar.config.presets import configure, configure_to_cap
from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS, TrainingConfig
from dvar.errors import DvarError, RefusedInput
from dvar.studio.draft import Draft
from dvar.studio.library import list_runs
from dvar.studio.queue import enqueue
from dvar.studio.run_files import IMAGES
from dvar.training.dataset import read_image
from dvar.training.family_fit import family_settings
from dvar.training.methods.registry import METHODS
from dvar.training.preflight import preflight

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NUMBERS = ("max_train_steps", "learning_rate", "train_batch_size", "resolution", "window", "threshold", "seed")
"""The numbers of the form; a preset gives their values."""


@dataclass(frozen=True)
class Form:
    """The content of the form of a new run.

    Attributes:
        name: The name of the run, which becomes its folder.
        method: The name of the method.
        model: A bundled model, one of the folder of models, or a hub id.
        word: The new word.
        noun: The class of the concept, as a noun.
        validation_prompt: The prompt of the sample images; a plain one if empty.
        numbers: `NUMBERS` that differ from those of the preset.
    """

    name: str
    method: str
    model: str
    word: str
    noun: str
    validation_prompt: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class ImageCheck:
    """The answer of preflight to one image: a problem, a remark, or nothing."""

    name: str
    problem: str = ""
    remark: str = ""


@dataclass(frozen=True)
class Check:
    """The answer of preflight to a new run.

    Attributes:
        images: Of each image.
        problems: Of the whole; none if it can start.
        remarks: Of the whole.
    """

    images: tuple[ImageCheck, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """The cost of a new run, as an earlier one of the same method, model and size had it.

    Attributes:
        like: The run that it is taken from.
        seconds: To the cap.
        peak: Bytes of memory; None where that run did not record them.
    """

    like: str
    seconds: float
    peak: int | None


def preset_numbers(method: str, model: str, models: Mapping[str, str]) -> dict[str, Any]:
    """Return the numbers of the form by the preset of a method and a model, one of ``models`` or a hub id."""
    settings = {"pretrained_model_name_or_path": models.get(model, model) or BUNDLED_MODEL}
    config = configure(settings, METHODS.find(method).config_type, family_settings)
    return {name: getattr(config, name) for name in NUMBERS}


def list_models(models_dir: Path | None) -> dict[str, str]:
    """Return the base models that can be chosen without a hub: the path of each by its name in the form."""
    models = {name: name for name in BUNDLED_MODELS}
    for path in sorted(models_dir.iterdir()) if models_dir else ():
        if path.suffix == ".safetensors" or (path / "model_index.json").exists():
            models[path.name] = str(path.resolve())
    return models


def build_settings(form: Form, root: Path, models: Mapping[str, str], images: Path) -> dict[str, Any]:
    """Return the settings of a run by field name.

    Raises:
        RefusedInput: The name, the method or the model is none; every problem is named.
    """
    problems = []
    if not NAME.fullmatch(form.name):
        rule = "a name has letters, digits, '.', '_' and '-', at most 64 of them"
        problems.append(f"{rule}, got {form.name[:80]!r}: give the run another name")
    if form.method not in METHODS:
        problems.append(f"the method must be one of {', '.join(METHODS)}, got {form.method[:80]!r}: choose one")
    if form.model not in models and not HUB_ID.fullmatch(form.model):
        rule = f"the base model must be one of {', '.join(models)}, or a hub id such as owner/name"
        problems.append(f"{rule}, got {form.model[:80]!r}: choose one, or start the studio with --models_dir")
    if problems:
        raise RefusedInput(problems)
    names = {item.name for item in fields(METHODS.find(form.method).config_type)}
    settings: dict[str, Any] = {
        "instance_data_dir": str(images),
        "pretrained_model_name_or_path": models.get(form.model, form.model),
        "placeholder_token": form.word,
        "initializer_token": form.noun,
        "validation_prompt": form.validation_prompt.strip() or None,
        "output_dir": str(root / form.name),
        **form.numbers,
    }
    if "class_noun" in names:  # whose new word starts from a rare token
        settings["class_noun"] = settings.pop("initializer_token")
    return {name: value for name, value in settings.items() if value not in (None, "")}


def check_new_run(form: Form, root: Path, models: Mapping[str, str]) -> tuple[Check, TrainingConfig | None]:
    """Return what preflight says of the draft with this form, and its config, where it has one."""
    draft = Draft(root)
    try:
        settings = build_settings(form, root, models, draft.images_folder)
        config, scaled = configure_to_cap(settings, METHODS.find(form.method).config_type, family_settings)
    except RefusedInput as error:
        return Check(tuple(ImageCheck(path.name) for path in draft.images), error.problems, ()), None
    rows = tuple(_check_image(path, config) for path in draft.images)
    problems: tuple[str, ...] = ()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            preflight(config)
        except RefusedInput as error:
            problems = error.problems
        except DvarError as error:
            problems = (str(error),)
    own = {row.problem for row in rows} | {row.remark for row in rows}
    if os.path.lexists(root / form.name):
        taken = f"a new run needs a folder of its own, and {root / form.name} exists: give the run another name"
        problems = (taken, *(problem for problem in problems if not problem.startswith("output_dir")))
    if not rows:
        problems = ("the images are missing: drop three to five of the concept", *_without_folder(problems))
    return (
        Check(
            rows,
            tuple(_in_words_of_form(problem) for problem in problems if problem not in own)
            or tuple(f"{row.name}: see below" for row in rows if row.problem),
            tuple(dict.fromkeys(text for text in [scaled, *_list_remarks(caught)] if text and text not in own)),
        ),
        config,
    )


def start(form: Form, root: Path, models: Mapping[str, str]) -> str:
    """Put the draft into the queue as a run, and return the run's name.

    Raises:
        RefusedInput: Preflight refuses it.
    """
    check, _ = check_new_run(form, root, models)
    if check.problems:
        raise RefusedInput(check.problems)
    folder = root / form.name
    settings = build_settings(form, root, models, folder / IMAGES)
    del settings["output_dir"]
    Draft(root).move_images(folder)
    enqueue(folder, form.method, settings)
    return form.name


def estimate(config: TrainingConfig, root: Path) -> Estimate | None:
    """Return what the newest run like ``config`` says of its time and memory; None where there is none."""
    same = ("method", "pretrained_model_name_or_path", "resolution", "train_batch_size", "mixed_precision")
    for run in list_runs(root):
        opened = run.opened
        if not opened or opened.steps < 10:
            continue
        if any(opened.config.get(name) != config.to_dict()[name] for name in same):
            continue
        pace = sum(opened.seconds.values()) / opened.steps
        peak = (opened.result or {}).get("memory", {}).get("peak")
        return Estimate(run.name, pace * config.max_train_steps, peak)
    return None


def _check_image(path: Path, config: TrainingConfig) -> ImageCheck:
    buckets = valid_buckets(config.aspect_ratio_buckets, config.resolution)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            read_image(path, max(8, config.resolution), crop=config.center_crop, buckets=buckets)
        except RefusedInput as error:
            return ImageCheck(path.name, problem="; ".join(error.problems))
    return ImageCheck(path.name, remark="; ".join(_list_remarks(caught)))


def _list_remarks(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """Return what dvar has warned of; other packages warn their own developers, by categories of their own."""
    return [str(item.message) for item in caught if item.category is UserWarning]


def _without_folder(problems: tuple[str, ...]) -> Iterator[str]:
    """Yield problems but for those of a folder of images that nobody has filled yet."""
    yield from (problem for problem in problems if not problem.startswith("instance_data_dir"))


def _in_words_of_form(problem: str) -> str:
    """Return a problem with the names that the form has for settings."""
    names = {
        "initializer_token": "the class noun",
        "class_noun": "the class noun",
        "placeholder_token": "the new word",
        "validation_prompt": "the prompt of the samples",
    }
    for name, words in names.items():
        problem = problem.replace(name, words)
    return problem
