"""The ranking of rules by the distance of their stops from the oracle, compared with the oracle and two controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.families import CONSTANT_FAMILY, FAMILIES, StrategyFamily, evaluate_grids, tune_family
from dvar.analysis.stop_quality import (
    ORACLE,
    LearningCurve,
    MeanInterval,
    StopQuality,
    assess_stop,
    bootstrap_mean,
)
from dvar.analysis.strategies import StopResult, Strategy
from dvar.recordings.recorded_run import CHOOSE, RecordedRun

RANDOM_DRAWS = 20
"""Random steps for each run."""
CONTROL = CONSTANT_FAMILY.name
ORACLE_NAME, RANDOM_NAME = "Oracle of the other half", "Random step"

Setting = tuple[float, float, float]
Settings = Mapping[str, Setting | None]
"""The tuned setting of each strategy family, by its name; None where it could not be tuned."""


@dataclass(frozen=True)
class RankedRule:
    """One rule on every run of a scope: what its stops are worth, and what deciding costs besides training.

    The distance of the stop ranks it, since every step up to there is trained; gain and context are those of the
    checkpoint that it keeps.

    Args:
        rule: Name of the rule.
        setting: How it was tuned.
        runs: The run of each outcome; a random step has several outcomes for each run.
        outcomes: The quality of each stop.
        cost: Mean cost of deciding, in forward passes of one sample.
        stops: The steps at which it stops.
    """

    rule: str
    setting: str
    runs: tuple[RecordedRun, ...]
    outcomes: tuple[StopQuality, ...]
    cost: float
    stops: tuple[float, ...]

    @property
    def distances(self) -> list[float]:
        """Return the oracle distance of each stop, in octaves."""
        return [quality.distance for quality in self.outcomes]

    @property
    def errors(self) -> list[float]:
        """Return how far each stop is from the oracle, in octaves, before or after it."""
        return [abs(distance) for distance in self.distances]


def evaluate_all(runs: Sequence[RecordedRun], notify: Callable[[str], None]) -> None:
    """Evaluate every setting of every strategy family on these runs, so that tuning on any of them is quick.

    Args:
        runs: The runs.
        notify: Called with a line of progress for each run.
    """
    for number, run in enumerate(runs, start=1):
        notify(f"tuning on {run.name}, {number} of {len(runs)}")
        evaluate_grids(FAMILIES, run)


@cache
def tune_rules(runs: tuple[RecordedRun, ...]) -> Settings:
    """Return the setting of every strategy family, by its name, tuned on these runs."""
    return {family.name: tune_family(family, runs) for family in FAMILIES}


def compute_ranking(runs: Sequence[RecordedRun], settings: Mapping[RecordedRun, Settings]) -> list[RankedRule]:
    """Return every rule on the runs, the nearest to the oracle first.

    A family is left out when it could not be tuned for some run, or when some run lacks the series that it reads.

    Args:
        runs: Recorded runs that have learned.
        settings: By run, the settings of the families.
    """
    by_name = {"Baseline": [strategies.baseline_strategy(run) for run in runs]}
    descriptions = {"Baseline": "its own cap"}
    for scaled in (False, True):
        presets = [strategies.paper_dvar_strategy(run, scaled) for run in runs]
        by_name[presets[0].name], descriptions[presets[0].name] = presets, "the paper's"
    for family in FAMILIES:
        chosen = [settings[run][family.name] for run in runs]
        tuned = [
            family.strategy(setting, strategies.baseline_cap(run))
            for setting, run in zip(chosen, runs, strict=True)
            if setting
        ]
        rules = [strategy.rule for strategy in tuned]
        if len(tuned) == len(runs) and all(map(strategies.can_evaluate, rules, runs)):
            by_name[family.name] = tuned
            descriptions[family.name] = _describe_setting(family, dict(zip(runs, chosen, strict=True)))
    results = [_read_stops(run, tuple(of_run)) for run, *of_run in zip(runs, *by_name.values(), strict=True)]
    ranking = [_judge_oracle(runs), _judge_random_steps(runs)]
    for index, name in enumerate(by_name):
        ranking.append(_judge(name, descriptions[name], runs, [of_run[index] for of_run in results]))
    return sorted(ranking, key=lambda rule: float(np.mean(rule.errors)))


@cache
def _read_stops(run: RecordedRun, chosen: tuple[Strategy, ...]) -> list[StopResult]:
    results = strategies.evaluate_strategies(chosen, run)
    return [results[strategy] for strategy in chosen]


def _judge(name: str, setting: str, runs: Sequence[RecordedRun], results: Sequence[StopResult]) -> RankedRule:
    pairs = list(zip(runs, results, strict=True))
    outcomes = tuple(
        assess_stop(run, result.stop, result.censored, kept_step=result.kept_step) for run, result in pairs
    )
    # Forward passes spent on deciding alone: no step is trained.
    cost = [
        strategies.count_forward_equivalents(StopResult(0, 0, False, result.forwards, result.images), run)
        for run, result in pairs
    ]
    stops = tuple(float(result.stop) for result in results)
    return RankedRule(name, setting, tuple(runs), outcomes, float(np.mean(cost)), stops)


def _judge_oracle(runs: Sequence[RecordedRun]) -> RankedRule:
    """Judge the oracle of one half of the images on the other: what no rule can be expected to beat.

    Runs whose half that chooses shows no gain have no such oracle, and are left out.
    """
    oracles = {run: LearningCurve.of_run(run, CHOOSE).step_at() for run in runs}
    oracles = {run: step for run, step in oracles.items() if np.isfinite(step)}
    outcomes = tuple(assess_stop(run, step) for run, step in oracles.items())
    return RankedRule(ORACLE_NAME, f"q ≥ {ORACLE}", tuple(oracles), outcomes, float("nan"), tuple(oracles.values()))


def _judge_random_steps(runs: Sequence[RecordedRun]) -> RankedRule:
    """Judge steps drawn uniformly up to Baseline's cap, several for each run."""
    random, repeated = np.random.default_rng(0), [run for run in runs for _ in range(RANDOM_DRAWS)]
    stops = [int(random.integers(1, min(strategies.baseline_cap(run), run.cap) + 1)) for run in repeated]
    outcomes = tuple(assess_stop(run, step) for run, step in zip(repeated, stops, strict=True))
    steps = tuple(map(float, stops))
    return RankedRule(RANDOM_NAME, "uniform to Baseline's cap", tuple(repeated), outcomes, 0.0, steps)


def _describe_setting(family: StrategyFamily, chosen: Mapping[RecordedRun, Setting | None]) -> str:
    """Return a setting, its window as a share of the cap; settings that differ by method are in their own tables."""
    texts = {
        (run.method, f"{100 * setting[0]:g} %" + (f", {setting[1]:g}" if len(family.thresholds) > 1 else ""))
        for run, setting in chosen.items()
        if setting
    }
    if len({text for _, text in texts}) == 1:
        return next(text for _, text in texts)
    return "by method, below" if len(texts) == len({method for method, _ in texts}) else "by concept"


def compare_errors(rule: RankedRule, other: RankedRule) -> MeanInterval:
    """Return how much further ``rule`` is from the oracle than ``other``, in octaves, paired by their concepts."""
    errors, others = _errors_by_concept(rule), _errors_by_concept(other)
    return bootstrap_mean([errors[name] - others[name] for name in errors if name in others])


def _errors_by_concept(rule: RankedRule) -> dict[str, float]:
    errors: dict[str, list[float]] = {}
    for run, error in zip(rule.runs, rule.errors, strict=True):
        errors.setdefault(run.concept, []).append(error)
    return {name: float(np.mean(of_concept)) for name, of_concept in errors.items()}
