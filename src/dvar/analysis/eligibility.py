"""May stopping rules be ranked on a method?  Only where it learns, early, and the loss on the fixed batch sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvar import mini
from dvar.analysis import strategies
from dvar.analysis.stop_quality import SCORE
from dvar.config.training import BUNDLED_MODEL
from dvar.recordings.archive import RecordedRun, RecordingArchive

IDENTITY, CEILING = "identity", 1.0
"""The judge's probability that a picture shows this very subject, where a judge knows the subjects; and its highest."""
ERRORS, WAY, EARLY, JITTERS = 5.0, 0.25, 0.9, 5.0
ENOUGH = 12
"""Runs that a gate is judged by: four tuning concepts, three seeds each."""


@dataclass(frozen=True)
class Eligibility:
    """What a method's runs gained up to its cap, as means over runs of several concepts and seeds.

    ``errors`` is the gain over its standard error; ``way`` its share of the way from the untrained model to
    ``ceiling``, nan where none is known; ``early`` the part of it reached by half of the cap; ``jitters`` the median
    fall of L_det, from step 0 to the last tenth of its values, over its jitter there (the standard deviation of first
    differences over the square root of 2, which is the noise of a curve that moves slowly).
    """

    runs: int
    cap: int
    start: float
    end: float
    ceiling: float
    errors: float
    way: float
    early: float
    jitters: float

    @classmethod
    def of(
        cls,
        cap: int,
        steps: ArrayLike,
        scores: ArrayLike,
        losses: Sequence[NDArray[np.float64]],
        ceiling: float = np.nan,
    ) -> Eligibility:
        """The figures of runs scored at ``steps`` up to ``cap``: ``scores`` [runs, steps], L_det of each run."""
        found = np.asarray(scores, np.float64)
        gains, mean = found[:, -1] - found[:, 0], found.mean(axis=0)
        gain, error = float(gains.mean()), np.nan
        if len(gains) > 1:
            error = float(gains.std(ddof=1) / np.sqrt(len(gains)))
        early = float(mean[np.asarray(steps) <= cap / 2].max() - mean[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(
                runs=len(found),
                cap=cap,
                start=float(mean[0]),
                end=float(mean[-1]),
                ceiling=ceiling,
                errors=float(np.divide(gain, error)),
                way=float(np.divide(gain, ceiling - mean[0])),
                early=float(np.divide(early, gain)),
                jitters=float(np.median([_fall(values) for values in losses])),
            )

    @classmethod
    def of_records(cls, records: Sequence[RecordedRun]) -> Eligibility:
        """The figures of a method's recorded runs up to Baseline's cap: of the identity where it was judged, else of
        Train CLIP image, whose ceiling is not known.
        """
        judged = all(("train", IDENTITY) in record.pictures for record in records)
        metric, ceiling = (IDENTITY, CEILING) if judged else (SCORE, np.nan)
        cap = min(min(strategies.cap(record), record.cap) for record in records)
        steps = records[0].scored_steps
        steps = np.append(steps[steps < cap], cap)
        scores = []
        for record in records:
            scored, values = record.scores("train", metric)
            scores.append(np.interp(steps, scored, values.mean(axis=1)))
        losses = [record.trace.values[record.trace.steps <= cap] for record in records]
        return cls.of(cap, steps, scores, losses, ceiling)

    @property
    def failed(self) -> tuple[str, ...]:
        """What keeps rules from being ranked, in words; a figure that is not known fails nothing."""
        bars = (
            (self.errors < ERRORS, f"its gain is {self.errors:.1f} standard errors (bar {ERRORS:g})"),
            (self.way < WAY, f"it goes {100 * self.way:.0f} % of the way to the ceiling (bar {100 * WAY:.0f})"),
            (
                self.early < EARLY,
                f"it has {100 * self.early:.0f} % of its gain by half of the cap (bar {100 * EARLY:.0f})",
            ),
            (self.jitters < JITTERS, f"L_det falls by {self.jitters:.1f} times its jitter (bar {JITTERS:g})"),
        )
        return tuple(said for missed, said in bars if missed)


def gate_of(shelf: RecordingArchive, method: str) -> Eligibility | None:
    """The gate of a method by the shelf's tuning records, where they are enough; else, if they are runs of the bundled
    model, by those that its settings were frozen with; None where neither is there.
    """
    records = shelf.for_tuning(method)
    if len(records) >= ENOUGH:
        return Eligibility.of_records(records)
    bundled = all(record.config.get("pretrained_model_name_or_path") == BUNDLED_MODEL for record in shelf.of(method))
    return Eligibility(**found) if bundled and (found := mini.gates().get(method)) else None


def _fall(values: NDArray[np.float64]) -> float:
    last = values[-max(8, len(values) // 10) :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(values[0] - last.mean(), np.diff(last).std() / np.sqrt(2)))
