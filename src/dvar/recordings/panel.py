"""The panel: the recordings that compare stopping rules where the time scale of training changes, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import product
from typing import Any

from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import preset_settings
from dvar.config.training import BUNDLED_MODEL
from dvar.diffusion.model_files import model_problems
from dvar.errors import RefusedInput
from dvar.recordings.concepts import concept_folders, laboratory_concepts, read_noun
from dvar.recordings.config import RecordConfig
from dvar.recordings.cost import UnitSeconds, estimate_seconds_left
from dvar.recordings.setting import FLOW_MODEL
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import read_status
from dvar.training.progress import format_duration

PROTOCOL = "panel"
TI, LORA, CUSTOM = PAPER_METHODS
SHIFTED = (TI, LORA)
"""The methods whose time scale is shifted; Custom Diffusion is recorded at its preset alone."""
LENGTHS = {TI: 1.0, LORA: 1.0, CUSTOM: 5 / 3}
"""Recorded cap over that of other protocols: Custom Diffusion goes on to 2,500 steps, four oracles or more."""
EARLIER_CONCEPTS = 16
"""The first laboratory concepts by name, on whose earlier recordings the settings of the rule were chosen."""
SEEN_CONCEPTS = ("red_striped_mug", "green_checked_boot")
"""Concepts that the rule was tried on before the panel."""


@dataclass(frozen=True)
class Variation:
    """One change of a run's time scale.

    Attributes:
        title: What is changed, for people.
        rate: Learning rate over the preset's.
        settings: Further settings of the method.
        images: Number of instance images; None for all of the concept's own.
        model: The base model.
    """

    title: str
    rate: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()
    images: int | None = None
    model: str = BUNDLED_MODEL


@dataclass(frozen=True)
class PanelStage:
    """A part of the panel that is balanced when it is complete.

    Attributes:
        panel: Name of the panel that it belongs to.
        title: What it varies.
        concepts: Number of concepts, the first of `panel_concepts`.
        methods: Methods by name.
        variations: What is recorded of each concept and method.
    """

    panel: str
    title: str
    concepts: int
    methods: tuple[str, ...]
    variations: tuple[Variation, ...]


PRESET = Variation("preset")
_BATCHES = tuple(Variation(f"batch {size}", settings=(("train_batch_size", size),)) for size in (1, 16))
_RANKS = tuple(Variation(f"rank {rank}", settings=(("rank", rank),)) for rank in (1, 16))
STAGES = (
    PanelStage(
        "shift", "learning rate × 1/4 and × 4", 8, SHIFTED, (Variation("rate × 1/4", 0.25), Variation("rate × 4", 4.0))
    ),
    PanelStage("shift", "learning rate × 1", 8, SHIFTED, (PRESET,)),
    PanelStage(
        "shift", "learning rate × 1/2 and × 2", 8, SHIFTED, (Variation("rate × 1/2", 0.5), Variation("rate × 2", 2.0))
    ),
    PanelStage("main", "all methods", 16, tuple(PAPER_METHODS), (PRESET,)),
    PanelStage("flow", "second base model", 8, tuple(PAPER_METHODS), (Variation("mini-flow", model=FLOW_MODEL),)),
    PanelStage(
        "images",
        "1, 3 and 10 images",
        8,
        SHIFTED,
        tuple(Variation(f"images {count}", images=count) for count in (1, 3, 10)),
    ),
    PanelStage("batch", "batches of 1 and 16", 8, SHIFTED, _BATCHES),
    PanelStage("rank", "ranks 1 and 16", 8, (LORA,), _RANKS),
    PanelStage("word", "random initial word", 8, SHIFTED, (Variation("word", settings=(("initializer", "random"),)),)),
    PanelStage("more", "all methods, all concepts", 48, tuple(PAPER_METHODS), (PRESET,)),
)
"""The whole panel in the order of its recording: what decides the comparisons of docs/protocol.md comes first."""


def rate_length(rate: float) -> float:
    """Return the recorded cap at a learning rate over that at the preset's.

    Time has been seen to scale as rate^-0.5 to rate^-0.8, for single concepts up to rate^-1.2. A slower run is recorded
    1 / rate times as long, a faster one 1 / sqrt(rate) times: the end of that range at which a run needs more.
    """
    return 1 / rate if rate < 1 else rate**-0.5


def panel_concepts() -> list[str]:
    """Return the laboratory concepts in the order of the panel, those that the rule was tried on before last.

    One of each class comes before a second one; otherwise they are in the order of the SHA-256 of their names, which
    nobody chose.
    """
    folders, names = concept_folders(), laboratory_concepts()
    earlier = {*names[:EARLIER_CONCEPTS], *SEEN_CONCEPTS}
    ordered: list[str] = []
    for group in ([name for name in names if name not in earlier], [name for name in names if name in earlier]):
        seen = dict[str, int]()
        rounds: list[tuple[int, int, str]] = []
        for name in sorted(group, key=lambda name: sha256(name.encode()).hexdigest()):
            noun = read_noun(folders[name])
            rounds.append((seen.get(noun, 0), len(rounds), name))
            seen[noun] = seen.get(noun, 0) + 1
        ordered += [name for *_, name in sorted(rounds)]
    return ordered


def plan_stage(stage: PanelStage, records: str) -> list[RecordingSpec]:
    """Return the recordings of a stage: concept by concept, each with all settings and methods.

    So the concepts of an interrupted stage are complete, but for the last ones, and comparisons stay paired.
    """
    concepts = panel_concepts()[: stage.concepts]
    return [
        _plan_run(method, concept, variation, records)
        for concept, variation, method in product(concepts, stage.variations, stage.methods)
    ]


def plan_panel(config: RecordConfig) -> dict[PanelStage, list[RecordingSpec]]:
    """Return the recordings of each stage that ``dvar record --panel`` asks for, each run in the first that has it.

    Raises:
        RefusedInput: No stage can be recorded, as its base model is not installed.
    """
    named = [stage for stage in STAGES if config.panel in ("all", stage.panel)]
    stages = [stage for stage in named if not find_missing_model(stage)]
    if not stages:
        raise RefusedInput([f"--panel {config.panel} cannot be recorded: {find_missing_model(named[0])}"])
    plan: dict[PanelStage, list[RecordingSpec]] = {}
    planned = set()
    for stage in stages:
        specs = [spec for spec in plan_stage(stage, config.records) if spec.name_in_records not in planned]
        planned |= {spec.name_in_records for spec in specs}
        plan[stage] = specs
    return plan


def format_stages(
    plan: Mapping[PanelStage, Sequence[RecordingSpec]], units: Mapping[str, UnitSeconds]
) -> Iterator[str]:
    """Yield a line for each stage of a plan: how much of it is recorded, and how long the rest takes.

    Args:
        plan: As `plan_panel` returns it.
        units: The unit seconds of each method; without those of a method, no time is given.
    """
    for stage, specs in plan.items():
        missing = [spec for spec in specs if read_status(spec).state != "done"]
        line = f"{stage.panel:<7}{stage.title:<32}{len(specs) - len(missing):>4} of {len(specs)} recorded"
        if missing and all(spec.method in units for spec in missing):
            seconds = sum(estimate_seconds_left(spec, units[spec.method]) for spec in missing)
            line += f", about {format_duration(seconds)} of one process left"
        yield line


def find_missing_model(stage: PanelStage) -> str:
    """Return why the base model of a stage cannot be used; empty if it can."""
    models = dict.fromkeys(variation.model for variation in stage.variations)
    return "; ".join(problem for model in models for problem in model_problems(model))


def describe_omissions(config: RecordConfig) -> Iterator[str]:
    """Yield a line for each stage that is left out, with the reason."""
    for stage in STAGES:
        if config.panel in ("all", stage.panel) and (problem := find_missing_model(stage)):
            yield f"{stage.title}: left out, {problem}"


def name_variation(setting: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the title of the variation that a recorded run's setting is; the setting itself if it is none."""
    if list(setting) == ["learning_rate"]:
        rate = setting["learning_rate"]["value"] / setting["learning_rate"]["preset"]
        titles = [variation.title for variation in _variations() if variation.rate != 1 and _near(variation.rate, rate)]
        return titles[0] if titles else f"rate × {rate:.3g}"
    for variation in _variations():
        values = {name: change["value"] for name, change in setting.items()}
        own = dict(variation.settings)
        own |= {"images": variation.images} if variation.images else {}
        own |= {"model": variation.model} if variation.model != BUNDLED_MODEL else {}
        if variation.rate == 1 and own == values:
            return variation.title
    return ", ".join(f"{name} {change['value']}" for name, change in setting.items())


def _variations() -> Sequence[Variation]:
    return [variation for stage in STAGES for variation in stage.variations]


def _near(first: float, second: float) -> bool:
    return abs(first / second - 1) < 1e-3


def _plan_run(method: str, concept: str, variation: Variation, records: str) -> RecordingSpec:
    settings = variation.settings
    if variation.rate != 1:
        rate = variation.rate * preset_settings("mini", method)["learning_rate"]
        settings = (("learning_rate", float(f"{rate:.6g}")), *settings)
    return RecordingSpec(
        method=method,
        concept=concept,
        records=records,
        protocol=PROTOCOL,
        model=variation.model,
        settings=settings,
        images=variation.images,
        length=LENGTHS[method] * rate_length(variation.rate),
    )
