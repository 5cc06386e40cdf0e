"""Protocols of recording: how much of a run is measured, and on which prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from dvar.stopping.cadence import Cadence, PerOctave, count_due

Pairing = Literal["all pairs", "row by row"]
PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)

CAP_FACTORS = {"textual-inversion": 1.0, "dreambooth-lora": 1.5, "custom-diffusion": 3.0}
"""The recorded cap over the preset's: 6100, 1500 and 1500 steps where the paper's caps are 6100, 1000 and 500."""

START_UP_CLASS_IMAGES = 2
"""Class images that are generated while the seconds of starting up are measured; the others are charged by number."""

CHECKPOINTS = 8
"""Checkpoints kept of a run, evenly spaced: a replay of any step trains at most an eighth of the cap."""

STRATIFIED, FRESH, UNSEEN, DRIFT, STABLE_RANK = "stratified", "fresh", "unseen", "drift", "stable_rank"
IMAGE_PROJECTIONS = "images"
"""The series of projections of the scored images, at scored steps."""
SAMPLES = MappingProxyType({STRATIFIED: 32, FRESH: 8, UNSEEN: 8, DRIFT: 8})
"""Samples of each series."""

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
class RecordingProtocol:
    """The amount that a recording measures.

    Attributes:
        share: Share of the recorded cap that is trained.
        scored_steps: Number of log-spaced steps whose images are scored.
        prompts: Prompts of each part, training and validation.
        seeds: Images of each prompt.
        sampling_steps: Sampling steps of an image; None for the preset's.
        every: The cadence of each series.
        class_images: Class images of Custom Diffusion; None for the preset's number.
        rounds: Rounds of images, each from other seeds: the first is generated while training, the others from the
            weights that were kept.
        probe_every: Steps between two evaluations of the paper's held batch.
        samples: Samples of each series.
        version: Raised whenever what is measured under the same name changes; versions are never mixed.
    """

    share: float
    scored_steps: int
    prompts: int
    seeds: int
    sampling_steps: int | None
    every: Mapping[str, Cadence]
    class_images: int | None = None
    rounds: int = 1
    probe_every: int = 1
    samples: Mapping[str, int] = field(default_factory=lambda: SAMPLES)
    version: int = 1

    @property
    def image_count(self) -> int:
        """Images of each part at a scored step, in all rounds."""
        return self.prompts * self.seeds * self.rounds

    @property
    def conditions(self) -> dict[str, Any]:
        """The protocol as plain values, without the rounds: more of them do not make it another recording."""
        return {
            "share": self.share,
            "scored": self.scored_steps,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "sampling_steps": self.sampling_steps,
            "every": {name: cadence_to_json(cadence) for name, cadence in self.every.items()},
            "class_pictures": self.class_images,
            # Recordings from before these could change do not name them.
            **({"samples": dict(self.samples)} if self.samples != SAMPLES else {}),
            **({"version": self.version} if self.version > 1 else {}),
        }

    def forwards(self, name: str, cap: int) -> int:
        """Return the samples that a series sends through a model in ``cap`` steps."""
        both = 2 if name == FRESH else 1  # fresh draws go through the frozen model too
        return count_due(self.every[name], cap) * self.samples[name] * both


def cadence_to_json(cadence: Cadence) -> int | dict[str, int]:
    """Return a cadence as a plain value."""
    return cadence if isinstance(cadence, int) else {"per_octave": cadence.count}


def _cadences(stratified: Cadence, fresh: Cadence, unseen: Cadence, drift: Cadence) -> Mapping[str, Cadence]:
    return MappingProxyType({STRATIFIED: stratified, FRESH: fresh, UNSEEN: unseen, DRIFT: drift})


_OFTEN, _LESS_OFTEN, _SELDOM = PerOctave(16), PerOctave(8), PerOctave(4)


PROTOCOLS = {
    "quick": RecordingProtocol(0.12, 8, 2, 2, 10, _cadences(20, 20, 20, 50), class_images=16),
    "cpu": RecordingProtocol(1.0, 30, 4, 2, 10, _cadences(10, 10, 20, 50), rounds=4),
    "panel": RecordingProtocol(
        1.0,
        16,
        8,
        4,
        8,
        _cadences(_OFTEN, _LESS_OFTEN, _LESS_OFTEN, _SELDOM),
        probe_every=10,
        samples=MappingProxyType({STRATIFIED: 64, FRESH: 8, UNSEEN: 64, DRIFT: 8}),
    ),
    "full": RecordingProtocol(1.0, 40, 8, 4, None, _cadences(5, 1, 5, 25)),
}
"""By name: minutes for each run; many concepts on two cores; many settings, their steps on a logarithmic scale;
everything, as densely as the paper's figures need it."""


def log_spaced_steps(cap: int, count: int, cadence: int = 1) -> list[int]:
    """Return about ``count`` steps: 0, ``cap``, and steps in equal ratios between, in multiples of ``cadence``."""
    between = np.geomspace(min(max(4, cadence), cap), cap, max(count - 1, 2))
    return sorted({0, cap, *(min(cadence * round(step / cadence), cap) for step in between)})


@dataclass(frozen=True)
class ScoringPrompts:
    """The prompts and seeds of the images of one part, the same at every scored step.

    Images are ordered by prompt, with several seeds for each and no seed twice: even and odd images are two halves with
    the same prompts.

    Attributes:
        prompts: The prompt of each image.
        texts: The text that CLIP compares it with.
        seeds: The seed of each image.
        places: The place that each prompt names, where a judge can recognise it.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    seeds: Sequence[int]
    places: tuple[str, ...] | None = None

    def for_round(self, number: int) -> ScoringPrompts:
        """Return the same prompts with the seeds of a round, which follow those of the rounds before; 0 is this one."""
        return replace(self, seeds=tuple(number * len(self.seeds) + seed for seed in self.seeds))

    @classmethod
    def for_prompts(
        cls, prompts: Sequence[str], subject: str, noun: str, seeds: int, places: Sequence[str] | None = None
    ) -> ScoringPrompts:
        """Return ``seeds`` images of each prompt.

        Args:
            subject: How the prompts call the concept; CLIP, which does not know the new word, reads ``noun`` instead.
        """
        repeated = [prompt for prompt in prompts for _ in range(seeds)]
        texts = tuple(text.replace(subject, noun) for text in repeated)
        repeated_places = None if places is None else tuple(place for place in places for _ in range(seeds))
        return cls(tuple(repeated), texts, tuple(range(len(repeated))), repeated_places)
