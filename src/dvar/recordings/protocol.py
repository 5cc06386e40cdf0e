"""Protocols of recording: how much of a run is measured, and on which prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

PAST = {"textual-inversion": 1.0, "dreambooth-lora": 1.5, "custom-diffusion": 3.0}
"""The recorded cap over the preset's: 6100, 1500 and 1500 steps where the paper's caps are 6100, 1000 and 500."""


CHECKPOINTS = 8
"""Whole checkpoints kept of a run, evenly: no step is further than an eighth of the cap from where a replay starts."""


STRATIFIED, FRESH, UNSEEN, DRIFT = "stratified", "fresh", "unseen", "drift"


FORWARDS = {STRATIFIED: 32, FRESH: 16, UNSEEN: 8, DRIFT: 8}
"""Samples that each series sends through the model: fresh draws go through the frozen one too."""


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


PROTOCOLS = {
    "quick": RecordingProtocol(0.12, 8, 2, 2, 10, _every(20, 20, 20, 50), class_pictures=16),
    "cpu": RecordingProtocol(1.0, 30, 4, 2, 10, _every(10, 10, 20, 50), rounds=4),
    "full": RecordingProtocol(1.0, 40, 8, 4, None, _every(5, 1, 5, 25)),
}
"""By name: a look in minutes; what two cores can do for many concepts; the issue's full size."""


def log_spaced(cap: int, count: int, cadence: int = 1) -> list[int]:
    """Return about ``count`` steps: 0, ``cap`` and steps between in equal ratios, rounded to multiples of a cadence."""
    between = np.geomspace(min(4, cap), cap, max(count - 1, 2))
    return sorted({0, cap, *(min(cadence * round(step / cadence), cap) for step in between)})


@dataclass(frozen=True)
class ScoringPrompts:
    """The pictures of one kind that every scored step draws: what the model reads, what the CLIP reads, and the seed.

    Prompt by prompt, each from several seeds in a row, no seed twice: even and odd pictures are two halves that share
    their prompts.  ``places`` names what was asked for, where a judge can tell.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    seeds: Sequence[int]
    places: tuple[str, ...] | None = None

    def again(self, number: int) -> ScoringPrompts:
        """Round ``number`` of the same, on the seeds that follow those of the rounds before it; 0 is this one."""
        return replace(self, seeds=tuple(number * len(self.seeds) + seed for seed in self.seeds))

    @classmethod
    def of(
        cls, prompts: Sequence[str], subject: str, noun: str, seeds: int, places: Sequence[str] | None = None
    ) -> ScoringPrompts:
        """``seeds`` pictures of each prompt; the CLIP knows no new word and reads the class noun for ``subject``."""
        each = [prompt for prompt in prompts for _ in range(seeds)]
        named = None if places is None else tuple(place for place in places for _ in range(seeds))
        return cls(tuple(each), tuple(text.replace(subject, noun) for text in each), tuple(range(len(each))), named)
