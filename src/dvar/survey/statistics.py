"""Statistics of votes with ties: intervals of shares, Davidson's model, Krippendorff's alpha."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Votes = NDArray[np.int64]
BETTER, EQUAL, WORSE = 1, 0, -1  # a vote as a number, from the candidate's point of view
MISSING = -9  # in a matrix of ratings, where a rater was not asked
MAX_NEWTON_STEPS = 100
CONVERGED = 1e-10  # a Newton step below this changes nothing
MAX_LOG_ODDS = 20  # a larger estimate has run away: the likelihood has no maximum


@dataclass(frozen=True)
class Interval:
    """A closed interval from ``low`` to ``high``."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def __or__(self, other: Interval) -> Interval:
        """Return the smallest interval that holds both."""
        return Interval(min(self.low, other.low), max(self.high, other.high))


def wilson_interval(hits: int, count: int, confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of the share ``hits / count``, [0, 1] when ``count`` is 0.

    Votes are taken as independent.

    Source: Wilson (1927).
    """
    if not count:
        return Interval(0.0, 1.0)
    z, share = NormalDist().inv_cdf(0.5 + confidence / 2), hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    low, high = 0.0 if not hits else middle - half, 1.0 if hits == count else middle + half
    return Interval(float(low), float(high))


def clustered_interval(
    hits: NDArray[np.bool_],
    raters: Votes,
    concepts: Votes,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the bootstrap percentile interval of a share when raters and concepts are both resampled.

    Votes of one rater are correlated, and so are votes about one concept; an interval that ignores this is too narrow.
    Each resample weighs a vote by how often its rater and its concept were drawn. With a single concept, only raters
    are resampled.

    Args:
        hits: Whether each vote counts towards the share: bool [votes].
        raters: The rater of each vote: int64 [votes].
        concepts: The concept of each vote: int64 [votes].
        confidence: Share of resamples within the interval.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Returns:
        The interval, [0, 1] without votes.

    Source: the pigeonhole bootstrap, Owen (2007), which errs on the wide side.
    """
    if not len(hits):
        return Interval(0.0, 1.0)
    unique_raters, rater_index = np.unique(raters, return_inverse=True)
    unique_concepts, concept_index = np.unique(concepts, return_inverse=True)
    cells = np.zeros((2, len(unique_raters), len(unique_concepts)))
    np.add.at(cells[0], (rater_index, concept_index), hits)
    np.add.at(cells[1], (rater_index, concept_index), 1)
    generator = np.random.default_rng(seed)
    rater_weights = _draw_weights(generator, len(unique_raters), resamples)
    several = len(unique_concepts) > 1
    concept_weights = _draw_weights(generator, len(unique_concepts), resamples) if several else np.ones((resamples, 1))
    hit, total = (((rater_weights @ part) * concept_weights).sum(axis=1) for part in cells)
    shares = hit[total > 0] / total[total > 0]
    low, high = np.quantile(shares, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _draw_weights(generator: np.random.Generator, clusters: int, resamples: int) -> Floats:
    """Draw how often each cluster is in each resample: float64 [resamples, clusters]."""
    return generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)


@dataclass(frozen=True)
class Strength:
    """Davidson's model of two rivals, fitted.

    Args:
        advantage: Log of the odds that the candidate is better rather than worse, when the side has no effect.
        left: Log of the odds that the left image is better rather than worse, when the two are equally good.
        ties: Davidson's nu.
        interval: Interval of ``advantage``.
        left_interval: Interval of ``left``.
    """

    advantage: float
    left: float
    ties: float
    interval: Interval
    left_interval: Interval

    def probabilities(self) -> tuple[float, float, float]:
        """Return the probabilities of better, equal and worse when the side has no effect."""
        up, down = np.exp(self.advantage / 2), np.exp(-self.advantage / 2)
        total = up + self.ties + down
        return float(up / total), float(self.ties / total), float(down / total)


def fit_davidson(votes: Votes, on_left: NDArray[np.bool_], confidence: float = 0.95) -> Strength | None:
    """Return the maximum-likelihood fit of Davidson's model, None where the likelihood has no maximum.

    It has none when one of the rivals, or one of the sides, was never better.

    Args:
        votes: `BETTER`, `EQUAL` or `WORSE` for each vote: int64 [votes].
        on_left: Whether the candidate was on the left: bool [votes].
        confidence: Coverage of the intervals.

    Source: Davidson (1970) for ties, Davidson and Beaver (1977) for the order of presentation; two rivals.
    Deviates: fitted by Newton's method, with intervals from the curvature; votes are taken as independent.
    """
    side = np.where(on_left, 1.0, -1.0)
    decided = votes != EQUAL
    candidate_votes, left_votes = votes[decided], (votes * side)[decided]
    if not ({1, -1} <= set(candidate_votes.tolist()) and {1.0, -1.0} <= set(left_votes.tolist())):
        return None
    ties = bool((~decided).any())
    design = _design_matrix(side, ties)
    outcome = 1 - votes  # 0 better, 1 equal, 2 worse
    chosen = design[np.arange(len(votes)), outcome if ties else outcome // 2]
    values, curvature = _maximise_likelihood(design, chosen)
    if np.abs(values[:2]).max() > MAX_LOG_ODDS or np.linalg.matrix_rank(curvature) < len(values):
        return None
    errors = np.sqrt(np.diag(np.linalg.inv(curvature))) * NormalDist().inv_cdf(0.5 + confidence / 2)
    intervals = [
        Interval(float(value - error), float(value + error)) for value, error in zip(values, errors, strict=True)
    ]
    nu = float(np.exp(values[2])) if ties else 0.0
    return Strength(float(values[0]), float(values[1]), nu, intervals[0], intervals[1])


def _design_matrix(side: Floats, ties: bool) -> Floats:
    """Return the coefficients of advantage, left and log nu in each outcome's score: [votes, outcomes, parameters].

    The scores of better, equal and worse are (a + s l) / 2, log nu and -(a + s l) / 2: a multinomial logit, so the
    likelihood has one maximum. Without ties, the outcome and the parameter of ties are left out.
    """
    zero, half = np.zeros_like(side), side / 2
    rows = [
        np.stack([np.full_like(side, 0.5), half, zero], axis=1),
        np.stack([zero, zero, np.ones_like(side)], axis=1),
        np.stack([np.full_like(side, -0.5), -half, zero], axis=1),
    ]
    design = np.stack(rows, axis=1)[:, np.array([True, ties, True]), :]
    return design[:, :, np.array([True, True, ties])]


def _maximise_likelihood(design: Floats, chosen: Floats) -> tuple[Floats, Floats]:
    """Return the parameters of a multinomial logit and the curvature of its likelihood, by Newton's method."""
    values = np.zeros(design.shape[2])
    curvature = np.eye(len(values))
    for _ in range(MAX_NEWTON_STEPS):
        scores = design @ values
        chances = np.exp(scores - scores.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        mean = np.einsum("vo,vop->vp", chances, design)
        gradient = (chosen - mean).sum(axis=0)
        spread = design - mean[:, None, :]
        curvature = np.einsum("vo,vop,voq->pq", chances, spread, spread)
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        values = values + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < CONVERGED:
            break
    return values, curvature


def nominal_distance(first: Votes, second: Votes) -> Floats:
    """Return 1 where two ratings differ, else 0."""
    return np.not_equal(first, second).astype(np.float64)


def squared_distance(first: Votes, second: Votes) -> Floats:
    """Return the squared difference of two ratings, by which better and worse are furthest apart."""
    return (first - second).astype(np.float64) ** 2


def krippendorff_alpha(ratings: Votes, distance: Callable[[Votes, Votes], Floats] = nominal_distance) -> float | None:
    """Return Krippendorff's alpha: 1 for full agreement, 0 for agreement by chance.

    Args:
        ratings: The ratings, with `MISSING` where a rater was not asked: int64 [raters, tasks].
        distance: Distance of two ratings.

    Returns:
        The alpha, None when no task was rated twice or all ratings are the same.

    Source: Krippendorff (2004), by coincidences: each task counts its pairs of ratings, divided by its raters less one.
    """
    kinds = np.unique(ratings[ratings != MISSING])
    counts = np.stack([(ratings == kind).sum(axis=0) for kind in kinds]) if len(kinds) else np.zeros((0, 0))
    counts = counts[:, counts.sum(axis=0) > 1].astype(np.float64)
    if not counts.size:
        return None
    raters = counts.sum(axis=0)
    coincidences = (counts / (raters - 1)) @ counts.T - np.diag((counts / (raters - 1)).sum(axis=1))
    distances = distance(kinds[:, None], kinds[None, :])
    total = coincidences.sum(axis=1)
    expected = (np.outer(total, total) * distances).sum() / (total.sum() - 1)
    return float(1 - (coincidences * distances).sum() / expected) if expected else None
