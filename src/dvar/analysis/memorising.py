"""The second clock: from which step on a run loses the obedience to its prompts, and what shows it without images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dvar.analysis.panel import PanelRun, PanelRuns
from dvar.analysis.stop_quality import MIN_CONCEPTS, MeanInterval, average_concepts, bootstrap_mean
from dvar.recordings.panel import PRESET
from dvar.recordings.protocol import DRIFT, STABLE_RANK, STRATIFIED, UNSEEN
from dvar.recordings.recorded_run import REPORT, Floats, Half, RecordedRun, Steps

GAP = "held-out gap"
CONSTANT_CLOCK = "constant"
NEVER = 2.0
"""What counts as the step of a clock that never strikes: so many times the length of the record."""
RIGHT = 1.0
"""Octaves within which a clock is right."""
_CLEAR, _THRESHOLDS = 2.0, 40


def memorising_step(run: PanelRun, half: Half = REPORT) -> float:
    """Return the first step from which on the images of a run obey their prompts clearly less than at its oracle.

    The measure is Validation CLIP text of images whose prompts and seeds are the same at every scored step. A step is
    clear where the mean change of an image since the first scored step at or after the oracle lies two standard errors
    below 0; from the returned step on all are.

    Args:
        run: A run that has learned.
        half: The half of the images that is read.

    Returns:
        nan where the last scored step is not clear.
    """
    steps, values = run.run.scores("validation", "clip_text", half)
    start = min(int(np.searchsorted(steps, run.oracle)), len(steps) - 1)
    changes = values[start + 1 :] - values[start]
    errors = np.std(changes, axis=1, ddof=1) / np.sqrt(changes.shape[1])
    clear = changes.mean(axis=1) < -_CLEAR * errors
    if not clear.size or not clear[-1]:
        return float("nan")
    unclear = np.flatnonzero(~clear)
    return float(steps[start + 1 + (int(unclear[-1]) + 1 if unclear.size else 0)])


def read_gap(run: RecordedRun) -> tuple[Steps, Floats]:
    """Return the logarithm of the loss on unseen renderings over that on the held draws, both relative to step 0."""
    (steps, held), (unseen_steps, unseen) = run.series(STRATIFIED), run.series(UNSEEN)
    common, of_held, of_unseen = np.intersect1d(steps, unseen_steps, return_indices=True)
    curves = (np.log(losses.mean(axis=1)) for losses in (unseen[of_unseen], held[of_held]))
    gap = np.subtract(*(curve - curve[0] for curve in curves))
    return common, gap


def read_rank_rise(run: RecordedRun) -> tuple[Steps, Floats]:
    """Return the stable rank of the learned update over its least value so far, minus 1."""
    steps, values = run.series(STABLE_RANK)
    rank = values[:, 0]
    return steps, rank / np.minimum.accumulate(rank) - 1


def read_drift(run: RecordedRun) -> tuple[Steps, Floats]:
    """Return the mean squared change of the prediction on images of the class."""
    steps, values = run.series(DRIFT)
    return steps, values.mean(axis=1)


SIGNALS: Mapping[str, tuple[tuple[str, ...], Callable[[RecordedRun], tuple[Steps, Floats]]]] = {
    GAP: ((STRATIFIED, UNSEEN), read_gap),
    "stable rank": ((STABLE_RANK,), read_rank_rise),
    "drift": ((DRIFT,), read_drift),
}
"""By name: the series that a signal is read from, and how. The gap needs images that were not trained on."""


@dataclass(frozen=True)
class ClockQuality:
    """The quality of a clock: how well it tells from which step on runs memorise.

    Attributes:
        name: The signal, or `CONSTANT_CLOCK`.
        error: The mean distance from the step by the images, in octaves.
        right: The share of runs whose distance is at most `RIGHT`.
        difference: The error minus that of the constant on the same runs, paired by concept.
        runs: Runs that were judged.
        memorising: Runs that memorise by their images.
        right_memorising: As ``right``, over the runs that memorise alone.
        difference_memorising: As ``difference``, over the runs that memorise alone.
    """

    name: str
    error: MeanInterval
    right: MeanInterval
    difference: MeanInterval
    runs: int
    memorising: int
    right_memorising: MeanInterval
    difference_memorising: MeanInterval

    @property
    def is_supported(self) -> bool:
        """Whether the clock is nearer than the constant and right more often than not, by both intervals.

        Both over all runs and over those that memorise: to be silent where nothing happens proves no signal.
        """
        pairs = ((self.difference, self.right), (self.difference_memorising, self.right_memorising))
        return all(
            difference.concepts >= MIN_CONCEPTS and difference.high < 0 and right.low > 0.5
            for difference, right in pairs
        )


def judge_clocks(panel: PanelRuns, runs: Sequence[PanelRun]) -> list[ClockQuality]:
    """Return how well the constant and each signal tell when these runs memorise, the constant first.

    A clock strikes at the first record at which its signal exceeds a threshold. The threshold of a run, and the
    constant, are chosen for its method on the other concepts at the preset, by the least mean distance. A clock that
    never strikes, a constant beyond the record, and a run that never memorises count as `NEVER` times the record's
    length, so that two of them agree.

    Args:
        panel: The panel, whose runs at the preset thresholds are chosen on.
        runs: The runs to judge.
    """
    constants = _strike_constants(panel, runs)
    qualities = [_assess(CONSTANT_CLOCK, constants, constants)]
    for name in SIGNALS:
        if strikes := _strike_signals(panel, name, runs):
            qualities.append(_assess(name, strikes, constants))
    return qualities


@cache
def _true_step(run: PanelRun) -> float:
    step = memorising_step(run)
    return step if np.isfinite(step) else NEVER * run.run.cap


def _error(run: PanelRun, step: float) -> float:
    return float(abs(np.log2(step / _true_step(run))))


def _other_presets(panel: PanelRuns, run: PanelRun) -> list[PanelRun]:
    others = panel.select([PRESET.title], [run.run.method])
    return [other for other in others if other.run.concept != run.run.concept]


def _strike_constants(panel: PanelRuns, runs: Sequence[PanelRun]) -> dict[PanelRun, float]:
    strikes = {}
    for run in runs:
        if others := _other_presets(panel, run):
            constant = float(2 ** np.median([np.log2(_true_step(other)) for other in others]))
            never = constant > min(run.run.cap, max(other.run.cap for other in others))
            strikes[run] = NEVER * run.run.cap if never else constant
    return strikes


def _strike_signals(panel: PanelRuns, name: str, runs: Sequence[PanelRun]) -> dict[PanelRun, float]:
    """Return where a signal strikes on the runs that have it, and others at the preset that have it too."""
    series, read = SIGNALS[name]
    signals = {run: read(run.run) for run in {*panel.runs, *runs} if all(map(run.run.has_series, series))}

    def strike(run: PanelRun, threshold: float) -> float:
        steps, values = signals[run]
        above = np.flatnonzero((values > threshold) & (steps > 0))
        return float(steps[above[0]]) if above.size else NEVER * run.run.cap

    strikes = {}
    for run in runs:
        others = [other for other in _other_presets(panel, run) if other in signals]
        if run in signals and others:
            levels = np.concatenate([signals[other][1] for other in others])
            thresholds = np.quantile(levels, np.linspace(0, 1, _THRESHOLDS))  # at the last one it never strikes
            errors = [np.mean([_error(other, strike(other, level)) for other in others]) for level in thresholds]
            strikes[run] = strike(run, float(thresholds[int(np.argmin(errors))]))
    return strikes


def _assess(name: str, strikes: Mapping[PanelRun, float], constants: Mapping[PanelRun, float]) -> ClockQuality:
    runs = list(strikes)
    concepts = np.array([run.run.concept for run in runs])
    errors = np.array([_error(run, strikes[run]) for run in runs])
    differences = errors - np.array([_error(run, constants[run]) for run in runs])
    right = (errors <= RIGHT).astype(np.float64)
    memorising = np.array([np.isfinite(memorising_step(run)) for run in runs])

    def mean(values: Floats, counted: NDArray[np.bool_] | slice = slice(None)) -> MeanInterval:
        return bootstrap_mean(average_concepts(concepts[counted].tolist(), values[counted].tolist()))

    return ClockQuality(
        name=name,
        error=mean(errors),
        right=mean(right),
        difference=mean(differences),
        runs=len(runs),
        memorising=int(memorising.sum()),
        right_memorising=mean(right, memorising),
        difference_memorising=mean(differences, memorising),
    )
