"""Comparisons of rules on the panel: errors in octaves, paired by concept, and what may be claimed from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dvar.analysis.panel import CONSTANT, CORRECTED, DVAR_TUNED, OCTAVE, PanelRun, PanelRuns, PanelStops
from dvar.analysis.stop_quality import MIN_CONCEPTS, MeanInterval, average_concepts, bootstrap_mean
from dvar.errors import RefusedInput

RATE_ENDS = ("rate × 1/4", "rate × 4")
COMPARISONS = ((OCTAVE, CONSTANT), (OCTAVE, CORRECTED), (OCTAVE, DVAR_TUNED))
"""The comparisons that the protocol names, in the order in which they are tested."""
_LEVEL = 0.05
_EXACT = 16
_FLIPS = 2**16

Outcome = Literal["won", "lost", "tie", "too few concepts"]


@dataclass(frozen=True)
class Comparison:
    """The difference of two rules' errors in octaves, below 0 where the first is nearer to the oracle.

    Attributes:
        first: Name of the rule.
        second: Name of the rule that it is compared with.
        difference: The mean over concepts, with an interval from resampling them.
        p: Share of sign flips of the concepts' differences whose mean is as far from 0.
        runs: Number of runs.
    """

    first: str
    second: str
    difference: MeanInterval
    p: float
    runs: int

    @property
    def outcome(self) -> Outcome:
        """Whether the first rule is nearer, further, or neither can be said.

        A registered comparison is won only if the sign flips agree with its interval; it is lost by the interval alone.
        """
        return "tie" if self.side == "won" and self.p >= _LEVEL else self.side

    @property
    def side(self) -> Outcome:
        """On which side of 0 the interval lies, which is all that the protocol asks of other comparisons."""
        if self.difference.concepts < MIN_CONCEPTS:
            return "too few concepts"
        if self.difference.high < 0:
            return "won"
        return "lost" if self.difference.low > 0 else "tie"


def compare_rules(stops: PanelStops, first: str, second: str, runs: Sequence[PanelRun] | None = None) -> Comparison:
    """Return the comparison of two rules on runs that both can stop, by default all.

    Args:
        stops: The stops on the runs.
        first: Name of the rule.
        second: Name of the rule that it is compared with.
        runs: Some of the runs of ``stops``.
    """
    pairs = (stops.stops[first], stops.stops[second])
    common = [run for run in (stops.runs if runs is None else runs) if all(run in of_rule for of_rule in pairs)]
    differences = [run.error(pairs[0][run]) - run.error(pairs[1][run]) for run in common]
    by_concept = average_concepts([run.run.concept for run in common], differences)
    return Comparison(first, second, bootstrap_mean(by_concept), sign_flip_p(by_concept), len(common))


def compare_registered(panel: PanelRuns) -> tuple[PanelStops, list[Comparison]]:
    """Return the stops on the runs at both ends of the learning rates, and the comparisons of the protocol on them.

    Raises:
        RefusedInput: Fewer than `MIN_CONCEPTS` concepts have such runs, and others to tune on; they are named.
    """
    stops = PanelStops.of(panel, panel.select(RATE_ENDS), panel.list_concepts(RATE_ENDS))
    comparisons = [compare_rules(stops, *names) for names in COMPARISONS]
    for comparison in comparisons:
        if comparison.outcome == "too few concepts":
            concepts = sorted({run.run.concept for run in stops.runs})
            rule = f"{comparison.first} − {comparison.second} needs {MIN_CONCEPTS} concepts with runs at learning rates"
            got = f"{comparison.difference.concepts} ({', '.join(concepts) or 'none'})"
            raise RefusedInput([f"{rule} × 1/4, × 4 and × 1, got {got}: record more with dvar record --panel shift"])
    return stops, comparisons


def may_claim(comparisons: Sequence[Comparison]) -> list[bool]:
    """Return for each comparison, in the order of the protocol, whether its outcome may be claimed.

    Once one is not won, nothing is claimed from the later ones, so that the chance of any false claim stays at 5 %.
    """
    claims, open_until_now = [], True
    for comparison in comparisons:
        claims.append(open_until_now)
        open_until_now = open_until_now and comparison.outcome == "won"
    return claims


def average_errors(stops: PanelStops, rule: str, runs: Sequence[PanelRun]) -> MeanInterval:
    """Return the mean error of a rule on some runs in octaves, with an interval where there are enough concepts."""
    of_rule = stops.stops[rule]
    counted = [run for run in runs if run in of_rule]
    errors = [run.error(of_rule[run]) for run in counted]
    mean = bootstrap_mean(average_concepts([run.run.concept for run in counted], errors))
    if mean.concepts >= MIN_CONCEPTS:
        return mean
    return MeanInterval(mean.mean, float("nan"), float("nan"), mean.concepts)


def sign_flip_p(values: Sequence[float]) -> float:
    """Return the share of sign flips of independent differences whose mean is as far from 0 as theirs.

    All flips up to 16 values; above, 65,536 random ones, always the same. Nan without values.
    """
    differences = np.asarray(values, np.float64)
    count = len(differences)
    if not count:
        return float("nan")
    if count <= _EXACT:
        signs = 1 - 2 * ((np.arange(2**count)[:, None] >> np.arange(count)) & 1)
    else:
        signs = np.random.default_rng(0).choice([-1, 1], (_FLIPS, count))
        signs[0] = 1
    means = np.abs(signs @ differences)
    return float((means >= abs(differences.sum()) - 1e-12 * np.abs(differences).sum()).mean())
