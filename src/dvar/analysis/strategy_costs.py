"""The strategies of Table 1 on recorded runs: where each ends, what it keeps, and the score of what it keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.families import CLIP_FAMILY, DVAR_FAMILY, tune_family
from dvar.analysis.stop_quality import reported_score
from dvar.analysis.strategies import StopResult, Strategy
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import Part, RecordedRun, RescoredRun
from dvar.stopping.rules import FixedSteps

_NO_SCORES = RescoredRun(np.array([], np.int64), {})


@dataclass(frozen=True)
class CostRow:
    """One strategy on one method: a stop result for each run, in the order of the runs.

    Args:
        method: Name of the method.
        strategy: Name of the strategy.
        runs: The recorded runs.
        results: Where the strategy ends each of them.
        rescored: The fresh scores of each run, where they include the steps that all strategies keep; else empty.
    """

    method: str
    strategy: str
    runs: tuple[RecordedRun, ...]
    results: tuple[StopResult, ...]
    rescored: tuple[RescoredRun, ...] = ()

    def per_concept(self, values: Sequence[float]) -> list[float]:
        """Return the mean over seeds of each concept."""
        by_concept: dict[str, list[float]] = {}
        for run, value in zip(self.runs, values, strict=True):
            by_concept.setdefault(run.concept, []).append(value)
        return [float(np.mean(seeds)) for seeds in by_concept.values()]

    def scores(self, part: Part, metric: str) -> list[float]:
        """Return the score of the kept checkpoint for each concept; empty where some run has no such score.

        Scores are those on fresh seeds where there are any, else those of the reporting half, interpolated between
        scored steps.
        """
        if any((part, metric) not in scored.image_scores for scored in self.rescored or self.runs):
            return []
        if self.rescored:
            fresh = zip(self.rescored, self.results, strict=True)
            return self.per_concept([scored.mean(result.kept_step, part, metric) for scored, result in fresh])
        pairs = zip(self.runs, self.results, strict=True)
        return self.per_concept([reported_score(run, result.kept_step, part, metric) for run, result in pairs])


@cache
def cost_rows(archive: RecordingArchive, method: str) -> list[CostRow]:
    """Return every strategy of Table 1 on every recorded run of a method.

    Few iters trains as long as CLIP-s did on average and at most. CLIP-s and one row of DVAR are tuned, on other
    concepts (`RecordingArchive.runs_to_tune_on`); without these CLIP-s has the paper's settings, scaled in time, and
    there is no tuned DVAR.
    """
    runs = archive.runs_of(method)
    others = {run: archive.runs_to_tune_on(method, run.concept) for run in runs}
    tuned = {family: {run: tune_family(family, others[run]) for run in runs} for family in (CLIP_FAMILY, DVAR_FAMILY)}
    whole = {family: of_family for family, of_family in tuned.items() if all(of_family.values())}

    def strategies_of(run: RecordedRun) -> list[Strategy]:
        clip, dvar = (whole[family][run] if family in whole else None for family in (CLIP_FAMILY, DVAR_FAMILY))
        tuned_clip = (
            CLIP_FAMILY.strategy(clip, strategies.baseline_cap(run)) if clip else strategies.clip_s_strategy(run)
        )
        presets = [strategies.paper_dvar_strategy(run, scaled) for scaled in (False, True)]
        return [strategies.baseline_strategy(run), tuned_clip, *presets, *([_tuned_dvar(dvar, run)] if dvar else [])]

    results = [list(strategies.evaluate_strategies(strategies_of(run), run).items()) for run in runs]
    by_name = {
        strategy.name: tuple(of_run[index][1] for of_run in results) for index, (strategy, _) in enumerate(results[0])
    }
    stops = [result.stop for result in by_name["CLIP-s"]]
    for name, steps in (("mean", round(float(np.mean(stops)))), ("max", max(stops))):
        few = Strategy(f"Few iters ({name})", FixedSteps(max(1, steps)))
        by_name[few.name] = tuple(strategies.evaluate_strategy(few, run) for run in runs)
    order = ["Baseline", "CLIP-s", "Few iters (mean)", "Few iters (max)"]
    order += [name for name in by_name if name.startswith("DVAR")]
    rescored = tuple(archive.rescored.get(run.name, _NO_SCORES) for run in runs)
    kept_by_run = [{of_strategy[index].kept_step for of_strategy in by_name.values()} for index in range(len(runs))]
    complete = all(steps <= set(scored.steps.tolist()) for steps, scored in zip(kept_by_run, rescored, strict=True))
    return [CostRow(method, name, runs, by_name[name], rescored if complete else ()) for name in order]


def kept_steps(archive: RecordingArchive) -> dict[RecordedRun, set[int]]:
    """Return the steps of each recorded run that some strategy of Table 1 keeps."""
    steps: dict[RecordedRun, set[int]] = {}
    for method in archive.methods:
        for row in cost_rows(archive, method):
            for run, result in zip(row.runs, row.results, strict=True):
                steps.setdefault(run, set()).add(result.kept_step)
    return steps


def best_dvar(names: Sequence[str] | Mapping[str, Any]) -> str:
    """Return which DVAR speaks for the method: the tuned one where there is one."""
    return next(name for name in ("DVAR (tuned)", "DVAR (preset scaled in time)") if name in names)


def _tuned_dvar(setting: tuple[float, float, float], run: RecordedRun) -> Strategy:
    return Strategy("DVAR (tuned)", DVAR_FAMILY.strategy(setting, strategies.baseline_cap(run)).rule)
