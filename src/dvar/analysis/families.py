"""Families of strategies, and the tuning of their settings on recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dvar.analysis.stop_quality import ORACLE, LearningCurve
from dvar.analysis.strategies import (
    Strategy,
    baseline_cap,
    can_evaluate,
    count_forward_equivalents,
    evaluate_strategies,
)
from dvar.recordings.recorded_run import PAIRED, SCORE, RecordedRun
from dvar.stopping.rules import AllOf, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import RELATIVE_LOSS

Setting = tuple[float, float, float]
"""Window and sampling cadence as shares of Baseline's steps, with the threshold between them."""


@dataclass(frozen=True)
class StrategyFamily:
    """Strategies that differ in their settings.

    Attributes:
        rule: Makes the rule for a window, in steps, and a threshold.
        thresholds: The thresholds to try.
        window_shares: The windows to try, as shares of Baseline's steps.
        sample_shares: The steps between two samples of images to try, as shares of Baseline's steps.
        keep_best: As `Strategy.keep_best`.
    """

    name: str
    rule: Callable[[int, float], Rule]
    thresholds: tuple[float, ...]
    window_shares: tuple[float, ...] = tuple(float(f"{share:.2g}") for share in np.geomspace(0.02, 0.5, 10))
    sample_shares: tuple[float, ...] = ()
    keep_best: bool = False

    def settings(self) -> list[Setting]:
        """Return every setting that is tried: at most 100."""
        return [
            (window, threshold, every)
            for every in self.sample_shares or (0.0,)
            for window in self.window_shares
            for threshold in self.thresholds
        ]

    def strategy(self, setting: Setting, cap: int) -> Strategy:
        """Return the strategy of a setting where Baseline trains ``cap`` steps."""
        share, threshold, every = setting
        window = max(8, round(share * cap))
        sample_every = max(1, round(every * cap)) if every else None
        return Strategy(self.name, self.rule(window, threshold), sample_every, self.keep_best)


def _decades(low: float, high: float) -> tuple[float, ...]:
    return tuple(float(f"{value:.2g}") for value in np.geomspace(low, high, 10))


_VARIANCE_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
DVAR_FAMILY = StrategyFamily("DVAR", lambda n, t: Dvar(n, t, strict_paper=True), _VARIANCE_SHARES)
CLIP_FAMILY = StrategyFamily(
    "CLIP-s",
    lambda n, t: Plateau(SCORE, n, t, mode="max"),
    (0.0, 0.005, 0.01, 0.02, 0.04),
    window_shares=(0.02, 0.04, 0.08, 0.12, 0.2, 0.3),
    sample_shares=(0.01, 0.02, 0.05),
    keep_best=True,
)
CONSTANT_FAMILY = StrategyFamily(
    "Best constant",
    lambda n, _: FixedSteps(n),
    (0.0,),
    window_shares=tuple(float(f"{share:.3g}") for share in np.geomspace(0.02, 1.0, 100)),
)
FAMILIES = (
    DVAR_FAMILY,
    StrategyFamily("DVAR with diagnoses", lambda n, t: Dvar(n, t), _VARIANCE_SHARES),
    StrategyFamily("DVAR, relative losses", lambda n, t: Dvar(n, t, metric=RELATIVE_LOSS), _VARIANCE_SHARES),
    StrategyFamily("DVAR, stratified draws", lambda n, t: Dvar(n, t, metric="stratified"), _VARIANCE_SHARES),
    StrategyFamily("DVAR, fresh paired draws", lambda n, t: Dvar(n, t, metric=PAIRED), _VARIANCE_SHARES),
    StrategyFamily(
        "DVAR on both batches",
        lambda n, t: AllOf((Dvar(n, t), Dvar(n, t, metric="stratified"))),
        _VARIANCE_SHARES,
    ),
    StrategyFamily("EMA percentile", lambda n, t: EmaPercentile(n, t), _decades(1e-5, 1e-2)),
    StrategyFamily("Hall", lambda n, t: Hall(n, t), _decades(2e-4, 5e-2)),
    StrategyFamily("Trend", lambda n, t: Trend(n, t, metric=RELATIVE_LOSS), _decades(2e-7, 2e-4)),
    StrategyFamily("Plateau of the loss", lambda n, t: Plateau(RELATIVE_LOSS, n, t), (0.0, *_decades(1e-5, 1e-2)[:9])),
    CLIP_FAMILY,
    CONSTANT_FAMILY,
)
"""Every family that is ranked.  A family may make combined rules too: any rule that is called on a trace."""


def tune_family(family: StrategyFamily, runs: Sequence[RecordedRun]) -> Setting | None:
    """Return the setting that keeps 90 % of the attainable gain at the least cost, by the means over the runs.

    The cost is that of training and of deciding, in forward passes: settings that stop at the same step may read very
    different numbers of images. Every family has at most 100 settings, so that all are tuned alike.

    Returns:
        The setting that keeps the most where none keeps enough; None where no run can be evaluated or has a gain.

    Source: Section 4.2, "to achieve 90% of the maximum possible train CLIP image score for the least number of
    iterations".
    Deviates: 90 % of the gain from the untouched model, which is more than 90 % of the score; and iterations together
    with the images and held samples that a strategy reads.
    """
    grids = [grid for run in runs if (grid := evaluate_grids((family,), run)[family]) is not None]
    if not grids:
        return None
    gains, costs = np.mean(grids, axis=0)
    enough = gains >= ORACLE * min(1.0, float(gains.max()))
    return family.settings()[int(np.where(enough, costs, np.inf).argmin())]


def evaluate_grids(
    families: Sequence[StrategyFamily], run: RecordedRun
) -> Mapping[StrategyFamily, NDArray[np.float64] | None]:
    """Return the gain kept and the forward passes of each setting of each family, [2, settings], on one run.

    Families that are evaluated together share the work on each record, and none is evaluated twice.

    Returns:
        None for a family of which neither is known: the run has no gain, or lacks a series that the family reads.
    """
    grids, curve, cap = _grids_of(run), LearningCurve.of_run(run), baseline_cap(run)
    missing = {
        family: [family.strategy(setting, cap) for setting in family.settings()]
        for family in families
        if family not in grids
    }
    for family, strategies in list(missing.items()):
        if not curve.learned or not can_evaluate(strategies[0].rule, run):
            grids[family] = None
            del missing[family]
    results = evaluate_strategies([strategy for strategies in missing.values() for strategy in strategies], run)
    for family, strategies in missing.items():
        gains = [curve.gain_at(results[strategy].kept_step) for strategy in strategies]
        costs = [count_forward_equivalents(results[strategy], run) for strategy in strategies]
        grids[family] = np.array([gains, costs], np.float64)
    return grids


@cache
def _grids_of(run: RecordedRun) -> dict[StrategyFamily, NDArray[np.float64] | None]:
    return {}
