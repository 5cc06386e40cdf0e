"""What is to be recorded: how much is measured, of which method, concept and seed, and what that costs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dvar import mini
from dvar.config import BUNDLED_MODEL, CONFIGS, AnyConfig, CustomDiffusionConfig, restored, written
from dvar.errors import RefusedInput
from dvar.laboratory.metrics import Pairing
from dvar.laboratory.records import digest
from dvar.settings import nearest
from dvar.trainer.concept import Concept, read_concept
from dvar.trainer.presets import configure

FACTS = "recording.json"
PAST = {"textual-inversion": 1.0, "dreambooth-lora": 1.5, "custom-diffusion": 3.0}
"""The recorded cap over the preset's: 6100, 1500 and 1500 steps where the paper's caps are 6100, 1000 and 500."""
CHECKPOINTS = 8
"""Whole checkpoints kept of a run, evenly: no step is further than an eighth of the cap from where a replay starts."""
STRATIFIED, FRESH, UNSEEN, DRIFT = "stratified", "fresh", "unseen", "drift"
FORWARDS = {STRATIFIED: 32, FRESH: 16, UNSEEN: 8, DRIFT: 8}
"""Samples that each series sends through the model: fresh draws go through the frozen one too."""
_ELSEWHERE = ("instance_data_dir", "class_data_dir", "output_dir", "overwrite", "resume_from_checkpoint", "report_to")
_WATCHED = ("window", "threshold", "validation_steps", "num_validation_images")
"""When a run is judged and shown: a record is read by any rule, so these may change without making it another."""
PLACES = {
    "beach": "on the beach",
    "snow": "in the snow",
    "night": "at night",
    "forest": "in the forest",
    "table": "on a table",
    "street": "on the street",
    "desert": "in the desert",
    "sea": "by the sea",
}
"""Where validation prompts put the subject, by the names that the bundled judge knows; no training caption has them."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    ``share`` of the recorded cap is trained; ``scored`` steps, log-spaced, have pictures: ``prompts`` times ``seeds``
    of each kind, drawn in ``sampling_steps`` (the preset's own where None).  ``every`` gives the steps between two
    values of a series; ``class_pictures`` are those of Custom Diffusion (the preset's number where None).  Pictures
    are drawn in ``rounds``, each of other seeds: the first while training, the others from the weights that were kept.
    """

    share: float
    scored: int
    prompts: int
    seeds: int
    sampling_steps: int | None
    every: Mapping[str, int]
    class_pictures: int | None = None
    rounds: int = 1

    @property
    def pictures(self) -> int:
        """Pictures of each kind at a scored step, those of all rounds."""
        return self.prompts * self.seeds * self.rounds

    @property
    def facts(self) -> dict[str, Any]:
        """The plan as plain values, but for the rounds: more of them make no other record."""
        plain = {**asdict(replace(self, every={})), "every": dict(self.every)}
        return {name: value for name, value in plain.items() if name != "rounds"}


def _every(stratified: int, fresh: int, unseen: int, drift: int) -> Mapping[str, int]:
    return MappingProxyType({STRATIFIED: stratified, FRESH: fresh, UNSEEN: unseen, DRIFT: drift})


PLANS = {
    "quick": Plan(0.12, 8, 2, 2, 10, _every(20, 20, 20, 50), class_pictures=16),
    "cpu": Plan(1.0, 30, 4, 2, 10, _every(10, 10, 20, 50), rounds=4),
    "full": Plan(1.0, 40, 8, 4, None, _every(5, 1, 5, 25)),
}
"""By name: a look in minutes; what two cores can do for many concepts; the issue's full size."""


@dataclass(frozen=True)
class Recording:
    """One run to be recorded, and by what; all of it plain values, so that another process can be told.

    ``records`` is the folder of all records.  ``concepts`` is a folder of concepts, each with a ``concept.json`` that
    holds its "noun", and ``clip`` the CLIP that scores: the bundled ones where None.  ``dino`` is optional.
    ``settings`` are of the method, by name, and come before its preset.
    """

    method: str
    concept: str
    seed: int = 0
    records: str = "records"
    plan: str = "cpu"
    model: str = BUNDLED_MODEL
    concepts: str | None = None
    clip: str | None = None
    dino: str | None = None
    pairing: Pairing = "all pairs"
    threads: int = 1
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def told(cls, text: str) -> Recording:
        """Return the recording that was written as JSON, its fields by name."""
        given = json.loads(text)
        return cls(**{**given, "settings": tuple((name, value) for name, value in given.get("settings", ()))})

    @property
    def name(self) -> str:
        """Method, concept and seed in one word, and after it the settings that are not the preset's."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings)
        return f"{self.method}/{self.concept}/{self.seed}" + (f" ({settings})" if settings else "")

    @property
    def folder(self) -> Path:
        """Where it is recorded."""
        return Path(self.records).expanduser() / self.method / self.concept / str(self.seed)

    @property
    def bundled(self) -> bool:
        """Whether it is the bundled model on a bundled concept, where more can be known of a picture."""
        return self.model == BUNDLED_MODEL and self.concepts is None

    @cached_property
    def noun(self) -> str:
        """The class noun of the concept."""
        return noun_of(self.pictures)

    @property
    def pictures(self) -> Path:
        """The folder of the concept's pictures."""
        return concept_folders(self.concepts)[self.concept]

    @cached_property
    def config(self) -> AnyConfig:
        """The settings of the run: the preset's, up to the recorded cap.

        Raises: RefusedInput when the learning rate depends on the cap, so that a shorter run would be no prefix.
        """
        noun = self.noun
        own: dict[str, Any] = {"placeholder_token": "<thing>"} if self.method == "dreambooth-lora" else {}
        if self.method == CustomDiffusionConfig.method:
            pictures = PLANS[self.plan].class_pictures
            own |= {"class_noun": noun, **({"num_class_images": pictures} if pictures else {})}
        elif dict(self.settings).get("initializer", "manual") == "manual":
            own["initializer_token"] = noun
        given = {
            "pretrained_model_name_or_path": self.model,
            "instance_data_dir": self.pictures,
            "output_dir": self.folder,
            "seed": self.seed,
            "probe_every": 1,  # a record is thinned when it is read
            **own,
            **dict(self.settings),
        }
        config, share = configure(given, self.method), PLANS[self.plan].share
        if not config.lr_scheduler.startswith("constant"):
            raise RefusedInput([f"a recorded run needs a constant learning rate, got {config.lr_scheduler}: change it"])
        cap = round(config.max_train_steps * PAST[self.method] * share)
        return replace(
            config,
            max_train_steps=cap,
            window=max(round(config.window * share), 8),
            checkpointing_steps=max(1, cap // CHECKPOINTS),
        )

    @property
    def scored(self) -> list[int]:
        """The steps whose pictures are scored: 0, the cap, and log-spaced ones between; all of them evaluated."""
        return log_spaced(self.config.max_train_steps, PLANS[self.plan].scored, self.config.probe_every)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a record to be this one: all but where it is kept and how it is computed."""
        config = _asked(self.config)
        judged = {"clip": self.clip, "dino": self.dino, "pairing": self.pairing, "noun": self.noun}
        weights = {"weights": _bundled_weights()} if BUNDLED_MODEL in (self.model, self.clip or BUNDLED_MODEL) else {}
        plan = {"plan": self.plan, **PLANS[self.plan].facts}
        return {"concept": self.concept, "settings": config, "measured": plan, "judged": judged, **weights}

    def foreign(self) -> str:
        """What the folder holds that is not this recording, whole or in part; empty when it may be written."""
        found = facts_of(self.folder)
        if found is None:
            there = (self.folder / "config.json").exists()
            return f"{self.folder} holds a run that was not recorded: name another --records" if there else ""
        found |= {"settings": _asked(restored(found.get("settings", {})))}  # one that is new here had its default then
        differing = [name for name, value in self.facts.items() if found.get(name) != value]
        said = f"{self.folder} was recorded under another {', '.join(differing)}"
        return f"{said}: name another --records, or remove it" if differing else ""

    def check(self) -> Concept:
        """Return the concept, read as the run will read it.

        Raises: RefusedInput with all that is wrong with the method, the concept and the settings.
        """
        if self.method not in CONFIGS:
            raise RefusedInput([f"method must be one of {', '.join(CONFIGS)}, got {self.method!r}"])
        if self.plan not in PLANS:
            raise RefusedInput([f"preset must be one of {', '.join(PLANS)}, got {self.plan!r}"])
        known = concept_folders(self.concepts)
        if self.concept not in known:
            said = f"there is no concept {self.concept!r}, the nearest is {nearest(self.concept, known)}"
            raise RefusedInput([f"{said}: see dvar concepts, or the folder given"])
        with warnings.catch_warnings(action="ignore"):  # the run itself will warn
            concept = read_concept(replace(self.config, overwrite=True))
        if len(concept.pictures) < 2:
            said = f"{self.pictures} holds one picture, and a concept that is scored needs two or more"
            raise RefusedInput([f"{said}: a likeness to one picture rewards its background"])
        return concept


def _asked(config: AnyConfig) -> dict[str, Any]:
    """The settings that make a record another record."""
    return {name: value for name, value in written(config).items() if name not in _ELSEWHERE + _WATCHED}


def concept_folders(folder: str | None = None) -> dict[str, Path]:
    """Return name to folder of the concepts in ``folder``, of the bundled ones without.

    Raises: RefusedInput when there is none.
    """
    if folder is None:
        return mini.concepts()
    found = {path.parent.name: path.parent for path in sorted(Path(folder).expanduser().glob("*/concept.json"))}
    if not found:
        said = f"{folder} holds no concepts: each is a folder of pictures"
        raise RefusedInput([f'{said} with a concept.json that says its class, {{"noun": "mug"}}'])
    return found


def noun_of(folder: Path) -> str:
    """Return the class noun of the concept in a folder.

    Raises: RefusedInput when its concept.json holds none.
    """
    try:
        return str(json.loads((folder / "concept.json").read_text(encoding="utf-8"))["noun"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedInput([f'{folder}/concept.json must hold {{"noun": "mug"}}, its class ({error})']) from error


@cache
def _bundled_weights() -> str:
    """The SHA-256 of the bundled model and judges: records made with other weights are other records."""
    sums = sha256()
    for folder in (mini.path(), mini.judges()):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            sums.update(digest(path).encode())
    return sums.hexdigest()


def log_spaced(cap: int, count: int, cadence: int = 1) -> list[int]:
    """Return about ``count`` steps: 0, ``cap`` and steps between in equal ratios, rounded to multiples of a cadence."""
    between = np.geomspace(min(4, cap), cap, max(count - 1, 2))
    return sorted({0, cap, *(min(cadence * round(step / cadence), cap) for step in between)})


@dataclass(frozen=True)
class Shots:
    """The pictures of one kind that every scored step draws: what the model reads, what the CLIP reads, and the seed.

    Prompt by prompt, each from several seeds in a row, no seed twice: even and odd pictures are two halves that share
    their prompts.  ``places`` names what was asked for, where a judge can tell.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    seeds: Sequence[int]
    places: tuple[str, ...] | None = None

    def again(self, number: int) -> Shots:
        """Round ``number`` of the same, on the seeds that follow those of the rounds before it; 0 is this one."""
        return replace(self, seeds=tuple(number * len(self.seeds) + seed for seed in self.seeds))

    @classmethod
    def of(
        cls, prompts: Sequence[str], subject: str, noun: str, seeds: int, places: Sequence[str] | None = None
    ) -> Shots:
        """``seeds`` pictures of each prompt; the CLIP knows no new word and reads the class noun for ``subject``."""
        each = [prompt for prompt in prompts for _ in range(seeds)]
        named = None if places is None else tuple(place for place in places for _ in range(seeds))
        return cls(tuple(each), tuple(text.replace(subject, noun) for text in each), tuple(range(len(each))), named)


def shots(recording: Recording, concept: Concept) -> dict[str, Shots]:
    """Return what is drawn of training prompts, taken evenly from the run's captions, and of validation prompts.

    Source: Section 4.1: 8 samples of prompts used in training, and prompts that training never saw.
    Deviates: the paper's validation prompts go with its concepts; ours are `PLACES`, the same for every concept.
    """
    config, plan = recording.config, PLANS[recording.plan]
    captions = list(dict.fromkeys(text for index in range(len(concept.pictures)) for text in concept.texts(index)))
    seen = [captions[index * len(captions) // plan.prompts] for index in range(plan.prompts)]
    places = list(PLACES)[: plan.prompts]
    unseen = [f"a photo of the {config.subject} {PLACES[place]}" for place in places]
    return {
        "train": Shots.of(seen, config.subject, recording.noun, plan.seeds),
        "validation": Shots.of(unseen, config.subject, recording.noun, plan.seeds, places),
    }


def facts_of(folder: Path) -> dict[str, Any] | None:
    """Return the `Recording.facts` that a folder was recorded under; None when nothing was recorded there."""
    try:
        return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def expected_seconds(recording: Recording, units: Mapping[str, float]) -> float:
    """Return what the recording takes, by counts times ``units``."""
    config, plan = recording.config, PLANS[recording.plan]
    cap = config.max_train_steps
    forwards = (cap // config.probe_every + 1) * config.eval_batch_size
    series = [name for name in plan.every if name != UNSEEN or recording.bundled]
    forwards += sum((cap // plan.every[name] + 1) * FORWARDS[name] for name in series)
    pictures = float(len(recording.scored) * 2 * plan.pictures)
    steps = plan.sampling_steps or config.num_inference_steps
    others = config.num_validation_images
    if isinstance(config, CustomDiffusionConfig) and not config.class_data_dir and config.prior_loss_weight:
        others += config.num_class_images
    pictures += others * config.num_inference_steps / steps
    return units["start_up"] + cap * units["train"] + forwards * units["forward"] + pictures * units["picture"]
