"""The statistics of votes that may be ties: intervals, a model of strength, agreement.  Pure: numpy and the counts.

Votes are numbers here: 1 where the candidate is better, 0 for equal, -1 where the baseline is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Votes = NDArray[np.int64]
BETTER, EQUAL, WORSE = 1, 0, -1
ROUNDS = 100
MISSING = -9
"""What stands in a table of ratings where a person was not asked."""


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``, both in it."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __or__(self, other: Interval) -> Interval:
        """The interval from the lower of both ends to the higher."""
        return Interval(min(self.low, other.low), max(self.high, other.high))


def wilson(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's interval of a share: every p from which ``hits`` of ``count`` is not too far by the normal law.

    It takes each vote for independent of all others. Without votes it is [0, 1].
    Source: Wilson (1927).
    """
    if not count:
        return Interval(0.0, 1.0)
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = 0.0 if not hits else middle - half, 1.0 if hits == count else middle + half
    return Interval(float(low), float(high))


def clustered(
    hits: NDArray[np.bool_],
    people: Votes,
    concepts: Votes,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the percentile interval of a share when both people and concepts are drawn again, with replacement.

    Votes of one person are alike, and so are votes about one concept: an interval that forgets it is too narrow. Each
    sample weighs a vote by how often its person and its concept were drawn; of a single concept, people alone are
    drawn. Without votes it is [0, 1].

    Source: the pigeonhole bootstrap, Owen (2007), which errs on the wide side.
    """
    if not len(hits):
        return Interval(0.0, 1.0)
    persons, of_person = np.unique(people, return_inverse=True)
    things, of_concept = np.unique(concepts, return_inverse=True)
    cells = np.zeros((2, len(persons), len(things)))
    np.add.at(cells[0], (of_person, of_concept), hits)
    np.add.at(cells[1], (of_person, of_concept), 1)
    draws = np.random.default_rng(seed)
    drawn_people = _drawn(draws, len(persons), resamples)
    drawn_concepts = _drawn(draws, len(things), resamples) if len(things) > 1 else np.ones((resamples, 1))
    hit, total = (((drawn_people @ part) * drawn_concepts).sum(axis=1) for part in cells)
    shares = hit[total > 0] / total[total > 0]
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _drawn(draws: np.random.Generator, clusters: int, resamples: int) -> Floats:
    """How often each cluster is drawn in each sample: float64 [resamples, clusters]."""
    return draws.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class Strength:
    """Davidson's model of two rivals: ``advantage`` is the log of how often the candidate is better for each time that
    the baseline is, where each stands on either side equally often; ``left`` is the same of the left side over the
    right one; ``ties`` is Davidson's nu.
    """

    advantage: float
    left: float
    ties: float
    interval: Interval
    left_interval: Interval

    def chances(self) -> tuple[float, float, float]:
        """The chances of better, equal and worse, without regard to the side."""
        up, down = np.exp(self.advantage / 2), np.exp(-self.advantage / 2)
        total = up + self.ties + down
        return float(up / total), float(self.ties / total), float(down / total)


def davidson(votes: Votes, on_left: NDArray[np.bool_], confidence: float = 0.95) -> Strength | None:
    """Return the most likely strength given votes and whether the candidate stood on the left.

    None where no most likely one exists: one of the rivals, or one of the sides, was never better.

    Source: Davidson (1970) for ties, Davidson and Beaver (1977) for the order of presentation; two rivals.
    Deviates: fitted by Newton's method, intervals from the curvature, each vote independent of all others.
    """
    side = np.where(on_left, 1.0, -1.0)
    decided = votes != EQUAL
    ahead, leftward = votes[decided], (votes * side)[decided]
    if not ({1, -1} <= set(ahead.tolist()) and {1.0, -1.0} <= set(leftward.tolist())):
        return None
    # Three outcomes with the scores (a + s l)/2, log nu and -(a + s l)/2: a multinomial logit, so its maximum is one.
    tied = bool((~decided).any())
    outcome = 1 - votes  # 0 better, 1 equal, 2 worse
    zero, half = np.zeros_like(side), side / 2
    rows = [
        np.stack([np.full_like(side, 0.5), half, zero], axis=1),
        np.stack([zero, zero, np.ones_like(side)], axis=1),
        np.stack([np.full_like(side, -0.5), -half, zero], axis=1),
    ]
    design = np.stack(rows, axis=1)  # [votes, outcomes, parameters]
    seen = np.array([True, tied, True])
    design, free = design[:, seen, :], np.array([True, True, tied])
    design = design[:, :, free]
    chosen = design[np.arange(len(votes)), outcome if tied else outcome // 2]
    values = np.zeros(int(free.sum()))
    curvature = np.eye(len(values))
    for _ in range(ROUNDS):
        scores = design @ values
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        mean = np.einsum("vo,vop->vp", chances, design)
        gradient = (chosen - mean).sum(axis=0)
        spread = design - mean[:, None, :]
        curvature = np.einsum("vo,vop,voq->pq", chances, spread, spread)
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        values = values + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < 1e-10:
            break
    if np.abs(values[:2]).max() > 20 or np.linalg.matrix_rank(curvature) < len(values):
        return None
    errors = np.sqrt(np.diag(np.linalg.inv(curvature))) * NormalDist().inv_cdf(0.5 + confidence / 2)
    around = [Interval(float(value - error), float(value + error)) for value, error in zip(values, errors, strict=True)]
    ties = float(np.exp(values[2])) if tied else 0.0
    return Strength(float(values[0]), float(values[1]), ties, around[0], around[1])


def nominal(first: Votes, second: Votes) -> Floats:
    """1 where two ratings differ, else 0."""
    return (first != second).astype(np.float64)


def ordered(first: Votes, second: Votes) -> Floats:
    """The squared difference of two ratings: better and worse are further apart than either is from equal."""
    return (first - second).astype(np.float64) ** 2


def krippendorff(ratings: Votes, distance: Callable[[Votes, Votes], Floats] = nominal) -> float | None:
    """Return Krippendorff's alpha of int64 [people, tasks] with `MISSING` where a person was not asked.

    1 is full agreement, 0 that of chance. None where no task was rated twice or all ratings are one and the same.
    Source: Krippendorff (2004), by coincidences: each task counts its pairs of ratings over its raters less one.
    """
    kinds = np.unique(ratings[ratings != MISSING])
    counts = np.stack([(ratings == kind).sum(axis=0) for kind in kinds]) if len(kinds) else np.zeros((0, 0))
    counts = counts[:, counts.sum(axis=0) > 1].astype(np.float64)
    if not counts.size:
        return None
    raters = counts.sum(axis=0)
    together = (counts / (raters - 1)) @ counts.T - np.diag((counts / (raters - 1)).sum(axis=1))
    apart = distance(kinds[:, None], kinds[None, :])
    total = together.sum(axis=1)
    expected = (np.outer(total, total) * apart).sum() / (total.sum() - 1)
    return float(1 - (together * apart).sum() / expected) if expected else None
