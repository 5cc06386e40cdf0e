"""The panel: the recordings that compare stopping rules where the time scale of training changes, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from dvar.config.methods import PAPER_METHODS
from dvar.config.training import BUNDLED_MODEL, FLOW_MODEL
from dvar.recordings.concepts import concept_folders, laboratory_concepts, read_noun

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
    PanelStage("flow", "second base model", 8, SHIFTED, (Variation("mini-flow", model=FLOW_MODEL),)),
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
