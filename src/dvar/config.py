"""Frozen settings of every command, with their help, ranges and checks.  Pure: no picture and no model is opened here.

A settings class states every default once: the command line shows it, a preset overrides it, a TOML file overrides the
preset and a flag overrides the file (`dvar.trainer.presets.configure`).  The defaults are the paper's.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from dvar.errors import RefusedInput

BUNDLED_MODEL = "mini"
ALIASES = {"train_data_dir": "instance_data_dir"}


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` (itself out when ``above``) up to but not including ``high``; never infinity or NaN."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        start = f"{'above' if self.above else 'at least'} {self.low:g}"
        return start if math.isinf(self.high) else f"{start} and below {self.high:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)


def setting(default: Any, help: str, allowed: Range | None = None, *, section: str = "") -> Any:
    """A dataclass field that carries its help and the numbers it admits; ``section`` opens a part of the help page."""
    return field(default=default, metadata={"help": help, "allowed": allowed, "section": section})


@dataclass(frozen=True, kw_only=True)
class TextualInversionConfig:
    """Every setting of ``dvar train textual-inversion``; a step is one update of the optimizer.

    Source: the defaults are the paper's, with its released command lines; `dvar.trainer.presets` names each source.
    Deviates: float32 arithmetic by default, where the released commands use fp16, because what the rule must see of
    L_det lies in its third digit.
    """

    pretrained_model_name_or_path: str = setting(
        BUNDLED_MODEL, "A hub id, a diffusers folder, or 'mini', the bundled model.", section="Model and pictures"
    )
    instance_data_dir: str | None = setting(None, "Folder with the pictures of the subject.")
    placeholder_token: str = setting("<thing>", "New word that will stand for the subject.")
    initializer_token: str | None = setting(None, "Known word whose embedding the new word starts from, such as mug.")
    learnable_property: Literal["object", "style"] = setting("object", "What is learned from the pictures.")
    num_vectors: int = setting(1, "Embedding vectors behind the new word.", COUNT)
    resolution: int = setting(512, "Side of the square training pictures in pixels, a multiple of 8.", Range(8))
    center_crop: bool = setting(True, "Crop the middle square; otherwise squeeze the whole picture into a square.")
    random_flip: bool = setting(True, "Mirror each picture left to right half of the time.")

    preset: str | None = setting(
        None, "Named settings to start from: 'mini' for the bundled model, 'paper' for others.", section="Training"
    )
    train_batch_size: int = setting(2, "Pictures in one forward pass of training.", COUNT)
    gradient_accumulation_steps: int = setting(1, "Forward passes in one step.", COUNT)
    gradient_checkpointing: bool = setting(False, "Recompute activations going backward: less memory, more time.")
    learning_rate: float = setting(1e-2, "Learning rate of AdamW.", POSITIVE)
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = setting("constant", "How the learning rate changes over the steps.")
    lr_warmup_steps: int = setting(0, "Steps over which the learning rate rises from 0.", NOT_NEGATIVE)
    adam_beta1: float = setting(0.9, "AdamW's memory of the gradient.", Range(0, 1))
    adam_beta2: float = setting(0.999, "AdamW's memory of the squared gradient.", Range(0, 1))
    adam_weight_decay: float = setting(1e-2, "AdamW's decay of the new vectors.", NOT_NEGATIVE)
    adam_epsilon: float = setting(1e-8, "AdamW's guard against division by zero.", POSITIVE)
    max_train_steps: int = setting(6100, "The cap: training ends here if the rule has not ended it before.", COUNT)
    mixed_precision: Literal["no", "fp16", "bf16"] = setting("no", "Arithmetic of the frozen model.")
    seed: int = setting(0, "Seed of everything that is drawn.", NOT_NEGATIVE)

    probe_every: int = setting(1, "Steps between two evaluations of the fixed batch.", COUNT, section="Stopping")
    eval_batch_size: int = setting(8, "Inputs in the fixed batch.", COUNT)
    window: int = setting(310, "DVAR's N: steps over which the recent variance is taken.")
    threshold: float = setting(0.15, "DVAR's alpha: stop when recent / whole variance is below it.")

    validation_prompt: str | None = setting(
        None, "Prompt of the sample pictures; a photo of the new word by default.", section="Sample pictures"
    )
    validation_steps: int = setting(500, "Steps between two sets of sample pictures.", COUNT)
    num_validation_images: int = setting(8, "Pictures in a set of samples.", COUNT)
    num_inference_steps: int = setting(50, "Denoising steps of a sample picture.", COUNT)
    guidance_scale: float = setting(7.5, "Classifier-free guidance of the sample pictures.", NOT_NEGATIVE)

    checkpointing_steps: int = setting(500, "Steps between two checkpoints.", COUNT, section="The run")
    checkpoints_total_limit: int | None = setting(None, "Newest checkpoints to keep; all of them by default.", COUNT)
    resume_from_checkpoint: str | None = setting(None, "Go on from 'latest', or from a checkpoint by its name.")
    report_to: Literal["none", "tensorboard", "wandb"] = setting(
        "none", "Tracker to tell of each step; trace.jsonl and report.html hold the curves in any case."
    )
    output_dir: str = setting("runs/textual-inversion", "Folder of the run.")
    overwrite: bool = setting(False, "Replace another run found in the output folder.")

    @property
    def sample_prompt(self) -> str:
        """The prompt of the sample pictures: the one asked for, or a plain one for what is learned."""
        plain = {"object": "a photo of {}", "style": "a picture in the style of {}"}.get(self.learnable_property, "{}")
        return self.validation_prompt or plain.format(self.placeholder_token)

    def problems(self) -> list[str]:
        """Everything wrong with these settings by themselves, a line each; empty when in order.

        The rule's own settings are the rule's to judge: `dvar.trainer.concept.rule_problems`.
        """
        faults = dict(self._faults())
        conflicts = [said for names, said in self.sound()._conflicts() if faults.keys().isdisjoint(names)]
        return [*faults.values(), *conflicts]

    def sound(self) -> TextualInversionConfig:
        """The same settings with each ill-formed one at its default, for checks that go on after a fault was found."""
        faults = dict(self._faults())
        defaults: dict[str, Any] = {item.name: item.default for item in fields(self) if item.name in faults}
        return replace(self, **defaults)

    def _faults(self) -> Iterator[tuple[str, str]]:
        """(setting, what is wrong) for each value of a wrong type or out of its range."""
        annotations = get_type_hints(type(self))
        for item in fields(self):
            value, annotation, allowed = getattr(self, item.name), annotations[item.name], item.metadata["allowed"]
            if not _admits(annotation, value):
                yield item.name, f"{item.name} must be {_wording(annotation)}, got {value!r}"
            elif value is not None and allowed and value not in allowed:
                yield item.name, f"{item.name} must be {allowed}, got {value!r}"

    def _conflicts(self) -> Iterator[tuple[set[str], str]]:
        """(settings concerned, what is wrong) for well-formed values that cannot be carried out, alone or together."""
        word, cap, warmup = self.placeholder_token, self.max_train_steps, self.lr_warmup_steps
        if not self.instance_data_dir:
            yield {"instance_data_dir"}, "instance_data_dir is missing: name the folder with the subject's pictures"
        if not self.initializer_token:
            yield {"initializer_token"}, "initializer_token is missing: give one word for the subject, such as mug"
        if word.split() != [word]:
            said = f"placeholder_token must be one word without spaces, got {word!r}: try '<thing>'"
            yield {"placeholder_token"}, said
        elif word not in self.sample_prompt:
            said = f"validation_prompt must hold the new word {word}, got {self.validation_prompt!r}: put it in"
            yield {"placeholder_token", "validation_prompt"}, said
        if self.resolution % 8:
            near = 8 * round(self.resolution / 8)
            yield {"resolution"}, f"resolution must be a multiple of 8, got {self.resolution}: try {near}"
        if warmup and self.lr_scheduler == "constant":
            said = f"lr_warmup_steps must be 0 when lr_scheduler is constant, got {warmup}: use constant_with_warmup"
            yield {"lr_warmup_steps", "lr_scheduler"}, said
        if warmup >= cap:
            said = f"lr_warmup_steps must be below max_train_steps ({cap}), got {warmup}: shorten the warm-up"
            yield {"lr_warmup_steps", "max_train_steps"}, said
        if self.overwrite and self.resume_from_checkpoint:
            said = "overwrite and resume_from_checkpoint exclude each other, got both: drop one of them"
            yield {"overwrite", "resume_from_checkpoint"}, said


def canonical(settings: Mapping[str, Any], known: type = TextualInversionConfig) -> dict[str, Any]:
    """The same settings under their own names: hyphens become underscores, and an alias the name it stands for.

    Raises: `RefusedInput` naming each unknown setting with the nearest known one, and each setting given twice.
    """
    names = [item.name for item in fields(known)]
    found: dict[str, Any] = {}
    problems = []
    for given, value in settings.items():
        plain = given.replace("-", "_")
        name = ALIASES.get(plain, plain)
        if name not in names:
            problems.append(f"unknown setting {given!r}: the nearest known one is {nearest(plain, [*names, *ALIASES])}")
        elif name in found:
            problems.append(f"{name} is given twice, the second time as {given!r}: keep one of them")
        found[name] = value
    if problems:
        raise RefusedInput(problems)
    return found


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like ``word``, however unlike."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings written in a TOML file, one ``name = value`` a line, under their own names.

    Raises: `RefusedInput` when the file is missing, is no TOML, or holds unknown settings (all are named).
    """
    try:
        written = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedInput([f"settings file {path}: {error.strerror or error}; check --config"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RefusedInput([f"settings file {path} is not valid TOML: {error}"]) from error
    try:
        return canonical(written)
    except RefusedInput as error:
        raise RefusedInput([f"settings file {path}: {problem}" for problem in error.problems]) from error


def _admits(annotation: Any, value: object) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(_admits(part, value) for part in get_args(annotation))
    if annotation in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if annotation is float else annotation)


def _wording(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if isinstance(annotation, UnionType):
        return " or ".join(_wording(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
