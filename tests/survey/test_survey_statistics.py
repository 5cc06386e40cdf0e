"""The statistics against independent references: definitions, closed forms, another library, textbooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import krippendorff as reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvar.survey.statistics import (
    MISSING,
    Interval,
    clustered_interval,
    fit_davidson,
    krippendorff_alpha,
    nominal_distance,
    squared_distance,
    wilson_interval,
)

Z95 = 1.959963984540054


def cast_votes(
    better: tuple[int, int], equal: tuple[int, int], worse: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return votes and sides with those counts, each (candidate on the left, on the right)."""
    votes = [
        value for value, counts in ((1, better), (0, equal), (-1, worse)) for count in counts for _ in range(count)
    ]
    on_left = [at == 0 for counts in (better, equal, worse) for at, count in enumerate(counts) for _ in range(count)]
    return np.array(votes, np.int64), np.array(on_left)


@given(st.integers(1, 400), st.data())
def test_wilsons_ends_are_the_shares_at_which_a_score_test_just_rejects(count: int, data: st.DataObject) -> None:
    hits = data.draw(st.integers(0, count))
    interval = wilson_interval(hits, count)
    for end in (interval.low, interval.high):
        assert 0 <= end <= 1
        if 0 < end < 1:
            assert abs(hits / count - end) == pytest.approx(Z95 * np.sqrt(end * (1 - end) / count), rel=1e-9)
    assert interval.low <= hits / count <= interval.high


@settings(max_examples=30)
@given(st.integers(1, 400), st.floats(0.5, 0.999), st.data())
def test_wilsons_interval_equals_scipys(count: int, confidence: float, data: st.DataObject) -> None:
    stats = pytest.importorskip("scipy.stats", reason="needs the extra: pip install 'dvar[lab]'")
    hits = data.draw(st.integers(0, count))
    expected = stats.binomtest(hits, count).proportion_ci(confidence, method="wilson")
    interval = wilson_interval(hits, count, confidence)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_union_of_two_intervals_holds_both() -> None:
    assert Interval(0.2, 0.4) | Interval(0.3, 0.7) == Interval(0.2, 0.7)
    assert Interval(0.3, 0.4) | Interval(0.1, 0.7) == Interval(0.1, 0.7)


def test_wilsons_interval_matches_published_values() -> None:
    # Newcombe (1998), Table I, method 3: 81 of 263 and 15 of 148.
    for hits, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        interval = wilson_interval(hits, count)
        assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)


def test_clusters_of_one_vote_give_a_plain_bootstrap_and_copies_of_a_vote_add_nothing() -> None:
    random = np.random.default_rng(0)
    hits = random.random(200) < 0.7
    raters = np.arange(200)
    concept = np.zeros(200, np.int64)
    plain = clustered_interval(hits, raters, concept)
    spread = np.sqrt(hits.mean() * (1 - hits.mean()) / 200)
    assert plain.low == pytest.approx(hits.mean() - Z95 * spread, abs=0.015)
    assert plain.high == pytest.approx(hits.mean() + Z95 * spread, abs=0.015)
    copied = clustered_interval(np.repeat(hits, 10), np.repeat(raters, 10), np.repeat(concept, 10))
    assert copied == plain
    both = clustered_interval(np.repeat(hits, 10), np.repeat(raters, 10), np.tile(np.arange(10), 200))
    assert both.low == pytest.approx(plain.low, abs=0.02)


def test_the_clustered_interval_equals_resampling_raters_and_concepts_by_hand() -> None:
    random = np.random.default_rng(3)
    raters, concepts = np.repeat(np.arange(8), 6), np.tile(np.arange(6), 8)
    hits = random.random(48) < 0.4 + 0.4 * (concepts % 2)
    table = hits.reshape(8, 6)
    shares = [table[random.integers(0, 8, 8)][:, random.integers(0, 6, 6)].mean() for _ in range(4000)]
    interval = clustered_interval(hits, raters, concepts, resamples=4000)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])), abs=0.025)
    wide = clustered_interval(hits, raters, concepts, resamples=4000, confidence=0.99)
    assert wide.low < interval.low < interval.high < wide.high
    assert clustered_interval(hits[:0], raters[:0], concepts[:0]) == Interval(0.0, 1.0)


def test_davidson_without_an_effect_of_the_side_has_its_closed_form() -> None:
    # With b better, w worse, e equal: pi1/pi2 = b/w and nu = e / sqrt(b w) (Davidson 1970, two objects).
    strength = fit_davidson(*cast_votes((30, 30), (12, 12), (15, 15)))
    assert strength is not None
    assert strength.advantage == pytest.approx(np.log(60 / 30), abs=1e-9)
    assert strength.ties == pytest.approx(24 / np.sqrt(60 * 30), abs=1e-9)
    assert strength.left == pytest.approx(0, abs=1e-9)
    assert strength.probabilities() == pytest.approx((60 / 114, 24 / 114, 30 / 114))
    # Without ties it is Bradley and Terry's, whose variance of the log odds is 1/b + 1/w.
    untied = fit_davidson(*cast_votes((30, 30), (0, 0), (15, 15)))
    assert untied is not None
    assert untied.ties == 0
    half = Z95 * np.sqrt(1 / 60 + 1 / 30)
    assert untied.interval.low == pytest.approx(np.log(2) - half, abs=1e-6)


counts = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=15)
@given(counts, counts, counts)
def test_the_fitted_strength_maximises_the_likelihood(better, equal, worse) -> None:  # type: ignore[no-untyped-def]
    votes, on_left = cast_votes(better, equal, worse)
    strength = fit_davidson(votes, on_left)
    assert strength is not None

    def likelihood(advantage: float, side: float, ties: float) -> float:
        """Davidson and Beaver's, written with worths as they do: the left side multiplies a worth."""
        ours = np.exp(advantage / 2) * np.where(on_left, np.exp(side / 2), np.exp(-side / 2))
        theirs = np.exp(-advantage / 2) * np.where(on_left, np.exp(-side / 2), np.exp(side / 2))
        tie = ties * np.sqrt(ours * theirs)
        chance = np.select([votes == 1, votes == 0], [ours, tie], theirs) / (ours + theirs + tie)
        return float(np.log(chance).sum())

    optimize = pytest.importorskip("scipy.optimize", reason="needs the extra: pip install 'dvar[lab]'")
    optimum = optimize.minimize(lambda at: -likelihood(at[0], at[1], np.exp(at[2])), np.zeros(3), tol=1e-10)
    fitted = (strength.advantage, strength.left, np.log(strength.ties))
    assert fitted == pytest.approx(tuple(optimum.x), abs=1e-3)
    spread = Z95 * np.sqrt(
        1 / _measure_curvature(lambda change: likelihood(fitted[0] + change, fitted[1], strength.ties))
    )
    assert strength.interval.high - strength.advantage >= spread * 0.999, "the others are estimated as well"
    best = likelihood(strength.advantage, strength.left, strength.ties)
    for change in (-0.01, 0.01):
        assert likelihood(strength.advantage + change, strength.left, strength.ties) < best
        assert likelihood(strength.advantage, strength.left + change, strength.ties) < best
        assert likelihood(strength.advantage, strength.left, strength.ties * (1 + change)) < best


def _measure_curvature(of: Callable[[float], float], step: float = 1e-3) -> float:
    """Return the negative second derivative of a function at 0."""
    return -(of(step) - 2 * of(0) + of(-step)) / step**2


def test_davidsons_interval_follows_from_the_fisher_information() -> None:
    # With the sides even, the side does not bear on the others; advantage and log nu remain. Their information is n
    # times the covariance of (p1 - p3) / 2 and of "equal".
    strength = fit_davidson(*cast_votes((30, 30), (12, 12), (15, 15)))
    assert strength is not None
    better, _, worse = strength.probabilities()
    count, equal = 114, 24 / 114
    information = np.array(
        [
            [(better + worse - (better - worse) ** 2) / 4, -(better - worse) * equal / 2],
            [-(better - worse) * equal / 2, equal * (1 - equal)],
        ]
    )
    half = Z95 * np.sqrt(np.linalg.inv(count * information)[0, 0])
    assert strength.interval.high - strength.advantage == pytest.approx(half, rel=1e-6)


def test_the_confidence_and_the_seed_change_the_intervals() -> None:
    votes = cast_votes((20, 12), (6, 8), (10, 15))
    some, most = fit_davidson(*votes), fit_davidson(*votes, 0.99)
    assert some is not None
    assert most is not None
    for narrow, wide in ((some.interval, most.interval), (some.left_interval, most.left_interval)):
        assert wide.high - wide.low == pytest.approx((narrow.high - narrow.low) * 2.5758293 / Z95, rel=1e-6)
    hits, raters = np.arange(60) % 3 == 0, np.arange(60) % 7
    first, same, other = (clustered_interval(hits, raters, raters, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_an_effect_of_the_side_is_not_mistaken_for_a_better_candidate() -> None:
    # Everyone presses left: no rival is better.
    strength = fit_davidson(*cast_votes((40, 5), (6, 6), (5, 40)))
    assert strength is not None
    assert strength.advantage == pytest.approx(0, abs=1e-9)
    assert 0.0 not in strength.left_interval
    assert strength.left > 1


@pytest.mark.parametrize(
    "votes", [((5, 5), (2, 2), (0, 0)), ((0, 0), (3, 3), (0, 0)), ((5, 0), (1, 1), (0, 5)), ((0, 0), (0, 0), (0, 0))]
)
def test_without_a_maximum_of_the_likelihood_there_is_no_strength(votes) -> None:  # type: ignore[no-untyped-def]
    assert fit_davidson(*cast_votes(*votes)) is None


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from([1, 0, -1, None, None]), min_size=6, max_size=6), min_size=2, max_size=6))
def test_alpha_equals_another_librarys(rows: list[list[int | None]]) -> None:
    ours = np.array([[MISSING if value is None else value for value in row] for row in rows], np.int64)
    theirs = np.array([[np.nan if value is None else value for value in row] for row in rows], float)
    rated_twice = np.isfinite(theirs).sum(axis=0) > 1
    kinds = np.unique(theirs[:, rated_twice][np.isfinite(theirs[:, rated_twice])])
    if len(kinds) < 2:
        assert krippendorff_alpha(ours) is None
        return
    levels: dict[Literal["nominal", "interval"], Any] = {"nominal": nominal_distance, "interval": squared_distance}
    for level, distance in levels.items():
        expected = reference.alpha(reliability_data=theirs[:, rated_twice], level_of_measurement=level)
        assert krippendorff_alpha(ours, distance) == pytest.approx(expected, abs=1e-9)


def test_alpha_matches_published_values() -> None:
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", section C: nominal, four observers, 0.743.
    observers = [
        "1 2 3 3 2 1 4 1 2 * * *",
        "1 2 3 3 2 2 4 1 2 5 * 3",
        "* 3 3 3 2 3 4 2 2 5 1 *",
        "1 2 3 3 2 4 4 1 2 5 1 *",
    ]
    ratings = np.array(
        [[MISSING if mark == "*" else int(mark) for mark in line.split()] for line in observers], np.int64
    )
    assert round(krippendorff_alpha(ratings) or 0, 3) == 0.743
    assert round(krippendorff_alpha(ratings, squared_distance) or 0, 3) == 0.849


def test_alpha_of_random_votes_is_near_zero() -> None:
    random = np.random.default_rng(0).integers(-1, 2, (10, 300))
    assert krippendorff_alpha(random) == pytest.approx(0, abs=0.03)
    assert krippendorff_alpha(np.repeat(random[:1], 4, axis=0)) == 1
