"""Plans of the panel: the recordings of each stage in their order, and how far they are."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import product

from dvar.config.presets import preset_settings
from dvar.diffusion.model_files import model_problems
from dvar.errors import RefusedInput
from dvar.recordings.config import RecordConfig
from dvar.recordings.cost import UnitSeconds, estimate_seconds_left
from dvar.recordings.panel import LENGTHS, PROTOCOL, STAGES, PanelStage, Variation, panel_concepts, rate_length
from dvar.recordings.spec import RecordingSpec
from dvar.recordings.sweep import read_status
from dvar.training.progress import format_duration


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
    plan: Mapping[PanelStage, Sequence[RecordingSpec]],
    units: Mapping[str, UnitSeconds],
    elsewhere: Collection[str] = (),
) -> Iterator[str]:
    """Yield a line for each stage of a plan: how much of it is recorded, and how long the rest takes.

    Args:
        plan: As `plan_panel` returns it.
        units: The unit seconds of each method; without those of a method, no time is given.
        elsewhere: The recordings that are somewhere else, by `RecordingSpec.name_in_records`.
    """
    for stage, specs in plan.items():
        here = [spec for spec in specs if spec.name_in_records not in elsewhere]
        missing = [spec for spec in here if read_status(spec).state != "done"]
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
