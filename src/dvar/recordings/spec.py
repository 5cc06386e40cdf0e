"""What is to be recorded: how much is measured, of which method, concept and seed, and what that costs."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from dvar import mini
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL, CONFIGS, AnyConfig, CustomDiffusionConfig, restored, written
from dvar.errors import RefusedInput, nearest
from dvar.recordings.archive import digest
from dvar.recordings.concepts import concept_folders, noun_of
from dvar.recordings.image_metrics import Pairing
from dvar.recordings.protocol import CHECKPOINTS, PAST, PLACES, PROTOCOLS, ScoringPrompts, log_spaced
from dvar.training.dataset import Concept, read_concept

FACTS = "recording.json"
_ELSEWHERE = ("instance_data_dir", "class_data_dir", "output_dir", "overwrite", "resume_from_checkpoint", "report_to")
_WATCHED = ("window", "threshold", "validation_steps", "num_validation_images")
"""When a run is judged and shown: a record is read by any rule, so these may change without making it another."""


@dataclass(frozen=True)
class RecordingSpec:
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
    def told(cls, text: str) -> RecordingSpec:
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
            pictures = PROTOCOLS[self.plan].class_pictures
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
        config, share = configure(given, self.method), PROTOCOLS[self.plan].share
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
        return log_spaced(self.config.max_train_steps, PROTOCOLS[self.plan].scored, self.config.probe_every)

    @property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a record to be this one: all but where it is kept and how it is computed."""
        config = _asked(self.config)
        judged = {"clip": self.clip, "dino": self.dino, "pairing": self.pairing, "noun": self.noun}
        weights = {"weights": _bundled_weights()} if BUNDLED_MODEL in (self.model, self.clip or BUNDLED_MODEL) else {}
        plan = {"plan": self.plan, **PROTOCOLS[self.plan].facts}
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
        if self.plan not in PROTOCOLS:
            raise RefusedInput([f"preset must be one of {', '.join(PROTOCOLS)}, got {self.plan!r}"])
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


@cache
def _bundled_weights() -> str:
    """The SHA-256 of the bundled model and judges: records made with other weights are other records."""
    sums = sha256()
    for folder in (mini.path(), mini.judges()):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            sums.update(digest(path).encode())
    return sums.hexdigest()


def shots(recording: RecordingSpec, concept: Concept) -> dict[str, ScoringPrompts]:
    """Return what is drawn of training prompts, taken evenly from the run's captions, and of validation prompts.

    Source: Section 4.1: 8 samples of prompts used in training, and prompts that training never saw.
    Deviates: the paper's validation prompts go with its concepts; ours are `PLACES`, the same for every concept.
    """
    config, plan = recording.config, PROTOCOLS[recording.plan]
    captions = list(dict.fromkeys(text for index in range(len(concept.pictures)) for text in concept.texts(index)))
    seen = [captions[index * len(captions) // plan.prompts] for index in range(plan.prompts)]
    places = list(PLACES)[: plan.prompts]
    unseen = [f"a photo of the {config.subject} {PLACES[place]}" for place in places]
    return {
        "train": ScoringPrompts.of(seen, config.subject, recording.noun, plan.seeds),
        "validation": ScoringPrompts.of(unseen, config.subject, recording.noun, plan.seeds, places),
    }


def facts_of(folder: Path) -> dict[str, Any] | None:
    """Return the `RecordingSpec.facts` that a folder was recorded under; None when nothing was recorded there."""
    try:
        return dict(json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
