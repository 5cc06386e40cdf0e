"""Specifications of recordings: of which method, concept and seed, under which conditions."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any

from dvar import mini
from dvar.config.fields import read_settings
from dvar.config.methods import PAPER_METHODS, CustomDiffusionConfig
from dvar.config.presets import configure
from dvar.config.training import BUNDLED_MODEL, BUNDLED_MODELS, TrainingConfig
from dvar.errors import RefusedInput, nearest
from dvar.files import read_json
from dvar.recordings.concept_images import list_image_files, write_training_images
from dvar.recordings.concepts import MIN_IMAGES, concept_folders, laboratory_concepts, read_noun, read_prompts
from dvar.recordings.config import RecordConfig
from dvar.recordings.protocol import (
    CAP_FACTORS,
    CHECKPOINTS,
    PROTOCOLS,
    Pairing,
    log_spaced_steps,
)
from dvar.recordings.recorded_run import file_digest
from dvar.recordings.setting import (
    IMAGES,
    LOCATIONS,
    MODEL,
    MONITORING,
    Setting,
    format_variant,
    list_changes,
)
from dvar.training.dataset import Concept
from dvar.training.methods.registry import config_from_dict
from dvar.training.preflight import preflight
from dvar.training.run_layout import CONFIG

CONDITIONS = "recording.json"


@dataclass(frozen=True)
class RecordingSpec:
    """One run to record, as plain values that another process can be given.

    Attributes:
        records: The folder of all recorded runs.
        protocol: How much is measured, by its name in `PROTOCOLS`.
        model: The base model: a hub id, a diffusers folder, or a bundled one by name.
        concepts: A folder of concepts, each a folder of images, with its "noun" in NAME.json beside it; None for the
            bundled concepts.
        clip: The CLIP that scores; None for the bundled one.
        dino: A DINO that scores too.
        lpips: File of an LPIPS that measures the diversity of samples.
        pairing: What an image is compared with, as in `dvar.recordings.image_metrics.similarity`.
        threads: CPU threads of the run.
        settings: Settings of the method by name, which take precedence over its preset.
        images: Number of instance images, its own first and then further renderings; None for all of its own.
        length: Recorded cap over that of the preset.
    """

    method: str
    concept: str
    seed: int = 0
    records: str = "records"
    protocol: str = "cpu"
    model: str = BUNDLED_MODEL
    concepts: str | None = None
    clip: str | None = None
    dino: str | None = None
    lpips: str | None = None
    pairing: Pairing = "all pairs"
    threads: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    images: int | None = None
    length: float = 1.0

    @classmethod
    def from_json(cls, text: str) -> RecordingSpec:
        """Return the specification that `to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "settings": tuple((name, value) for name, value in values.get("settings", ()))})

    def to_json(self) -> str:
        """Return the specification as JSON, its fields by name."""
        return json.dumps(asdict(self))

    @property
    def name(self) -> str:
        """Method, concept and seed in one word, and after it the settings that are not the preset's."""
        settings = ", ".join(f"{name} {value}" for name, value in self.settings)
        return f"{self.method}/{self.concept}/{self.seed}" + (f" ({settings})" if settings else "")

    @cached_property
    def setting(self) -> Setting:
        """The settings that make this another recording than the preset's, by name.

        Raises:
            RefusedInput: A setting is unknown.
        """
        if self.method not in PAPER_METHODS:  # `validate` refuses it, under the folder's lock
            return {}
        changes = list_changes(self.model, dict(self.settings), PAPER_METHODS[self.method])
        if self.images is not None:
            own = len(list_image_files(self.image_folder))
            changes |= {IMAGES: {"value": self.images, "preset": own}} if self.images != own else {}
        return changes

    @property
    def name_in_records(self) -> str:
        """The name of the recorded run: method, concept and seed, with the settings that are not the preset's."""
        return f"{self.method}/{self.concept}/{self.seed}{format_variant(self.setting)}"

    @property
    def folder(self) -> Path:
        """The folder of the recorded run: its seed, and after it the settings that are not the preset's.

        A recording from before settings were in the name keeps its folder.
        """
        records = Path(self.records).expanduser()
        plain = records / self.method / self.concept / str(self.seed)
        return plain if self._recorded_without_name(plain) else records / self.name_in_records

    @property
    def bundled(self) -> bool:
        """Whether this is a bundled model on a bundled concept, whose images can be judged further."""
        return self.model in BUNDLED_MODELS and self.concepts is None

    @cached_property
    def noun(self) -> str:
        """The class noun of the concept."""
        return read_noun(self.image_folder)

    @property
    def image_folder(self) -> Path:
        """The folder of the concept's own images."""
        return concept_folders(self.concepts)[self.concept]

    @property
    def training_folder(self) -> Path:
        """The folder of the images that the run trains on."""
        if IMAGES not in self.setting:
            return self.image_folder
        return Path(self.records).expanduser() / "images" / str(self.images) / self.concept

    def reference_paths(self, concept: Concept) -> list[Path]:
        """Return the images that generated ones are compared with: the concept's own, whatever the run trains on."""
        if IMAGES in self.setting:
            return list_image_files(self.image_folder)
        return [self.image_folder / name for name in concept.names]

    @cached_property
    def config(self) -> TrainingConfig:
        """The settings of the run: the preset's, up to the recorded cap.

        Raises:
            RefusedInput: The learning rate depends on the cap, so that a shorter run would be another run.
        """
        own: dict[str, Any] = {"placeholder_token": "<thing>"} if self.method == "dreambooth-lora" else {}
        protocol = PROTOCOLS[self.protocol]
        if self.method == CustomDiffusionConfig.method:
            own["class_noun"] = self.noun
            if protocol.class_images:
                own["num_class_images"] = protocol.class_images
        elif dict(self.settings).get("initializer", "manual") == "manual":
            own["initializer_token"] = self.noun
        settings = {
            "pretrained_model_name_or_path": self.model,
            "instance_data_dir": self.training_folder,
            "output_dir": self.folder,
            "seed": self.seed,
            "probe_every": protocol.probe_every,  # sparser cadences are read off this one
            "eval_timesteps": "uniform",  # the paper's held batch; stratified draws are a series of their own
            **own,
            **dict(self.settings),
        }
        config = configure(settings, PAPER_METHODS[self.method])
        if not config.lr_scheduler.startswith("constant"):
            raise RefusedInput([f"a recorded run needs a constant learning rate, got {config.lr_scheduler}: change it"])
        cap = round(config.max_train_steps * CAP_FACTORS[self.method] * protocol.share * self.length)
        return replace(
            config,
            max_train_steps=cap,
            window=max(round(config.window * protocol.share), 8),
            checkpointing_steps=max(1, cap // CHECKPOINTS),
        )

    @property
    def scored_steps(self) -> list[int]:
        """The steps whose images are scored: 0, the cap, and log-spaced steps between, all with an evaluation."""
        count = PROTOCOLS[self.protocol].scored_steps
        return log_spaced_steps(self.config.max_train_steps, count, self.config.probe_every)

    @property
    def conditions(self) -> dict[str, Any]:
        """The values that two recordings share if they are the same, whatever their folders and machines."""
        judged: dict[str, Any] = {"clip": self.clip, "dino": self.dino, "pairing": self.pairing, "noun": self.noun}
        if prompts := read_prompts(self.image_folder):
            judged["prompts"] = list(prompts)
        if self.lpips:  # a recording without one stays what it was
            judged["lpips"] = self.lpips
        model = self.model if self.model in BUNDLED_MODELS else BUNDLED_MODEL
        weights = {"weights": _bundled_weights(model)} if model == self.model or not self.clip else {}
        measured = {"plan": self.protocol, **PROTOCOLS[self.protocol].conditions}
        settings = _identifying_settings(self.config)
        if IMAGES in self.setting:
            measured[IMAGES] = self.images
        return {"concept": self.concept, "settings": settings, "measured": measured, "judged": judged, **weights}

    def find_conflict(self) -> str:
        """Return why this recording may not be written to its folder; empty if it may."""
        conditions = read_conditions(self.folder)
        if conditions is None:
            occupied = (self.folder / CONFIG).exists()
            return f"{self.folder} holds a run that was not recorded: name another --records" if occupied else ""
        # A setting that is new since then had its default.
        conditions |= {"settings": _identifying_settings(config_from_dict(conditions.get("settings", {})))}
        changed = [name for name, value in self.conditions.items() if conditions.get(name) != value]
        rule = f"{self.folder} was recorded under another {', '.join(changed)}"
        return f"{rule}: name another --records, or remove it" if changed else ""

    def validate(self) -> Concept:
        """Return the concept, read as the run will read it.

        Raises:
            RefusedInput: The method, the concept or the settings cannot be used; every problem is named.
        """
        if self.method not in PAPER_METHODS:
            raise RefusedInput([f"method must be one of {', '.join(PAPER_METHODS)}, got {self.method!r}"])
        if self.protocol not in PROTOCOLS:
            raise RefusedInput([f"preset must be one of {', '.join(PROTOCOLS)}, got {self.protocol!r}"])
        concepts = concept_folders(self.concepts)
        if self.concept not in concepts:
            near = nearest(self.concept, concepts)
            rule = f"there is no concept {self.concept!r}{f', the nearest is {near}' if near else ''}"
            raise RefusedInput([f"{rule}: see dvar concepts, or the folder given"])
        if IMAGES in self.setting:
            count = int(self.setting[IMAGES]["value"])
            write_training_images(self.image_folder, self.training_folder, count, bundled=self.concepts is None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself will warn
            concept = preflight(replace(self.config, overwrite=True), load_tokenizer=None)
        if len(self.reference_paths(concept)) < MIN_IMAGES:
            rule = f"{self.image_folder} holds one image, and a concept that is scored needs two or more"
            raise RefusedInput([f"{rule}: similarity to one image rewards its background"])
        return concept

    def _recorded_without_name(self, folder: Path) -> bool:
        """Return whether a folder that names no setting holds a recording under this one."""
        recorded = (read_conditions(folder) or {}).get("settings", {}) if self.setting else {}
        return bool(recorded) and all(
            recorded.get("pretrained_model_name_or_path" if name == MODEL else name)
            == (self.model if name == MODEL else change["value"])
            for name, change in self.setting.items()
        )


def plan_recordings(config: RecordConfig) -> list[RecordingSpec]:
    """Return the recordings of every method, concept and seed that a `dvar record` command asks for.

    Seed by seed and concept by concept, so that an unfinished sweep covers all methods alike.

    Raises:
        RefusedInput: The settings file or the folder of concepts cannot be read.
    """
    method = config.methods[0]
    settings = read_settings(config.config, PAPER_METHODS[method]) if config.config and method in PAPER_METHODS else {}
    concepts = (config.concepts or laboratory_concepts(config.concepts_dir))[: config.first]
    return [
        RecordingSpec(
            method=method,
            concept=concept,
            seed=seed,
            records=config.records,
            protocol=config.protocol,
            model=config.model,
            concepts=config.concepts_dir,
            clip=config.clip,
            dino=config.dino,
            lpips=config.lpips,
            pairing=config.pairing,
            settings=tuple(settings.items()),
        )
        for seed, concept, method in product(config.seeds, concepts, config.methods)
    ]


def read_conditions(folder: Path) -> dict[str, Any] | None:
    """Return the `RecordingSpec.conditions` of the recording in a folder; None if there is no recording."""
    try:
        return dict(read_json(folder / CONDITIONS, {"settings?": dict}))
    except (OSError, ValueError):
        return None


def _identifying_settings(config: TrainingConfig) -> dict[str, Any]:
    """Return the settings whose change makes another recording."""
    others = LOCATIONS + MONITORING
    return {name: value for name, value in config.to_dict().items() if name not in others}


@cache
def _bundled_weights(model: str) -> str:
    """Return the SHA-256 of a bundled model and of the judges: with other weights a recording is another one."""
    digest = sha256()
    for folder in (mini.path(model), mini.judges()):
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(file_digest(path).encode())
    return digest.hexdigest()
