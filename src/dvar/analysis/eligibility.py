"""Eligibility of methods for ranking rules: whether they learn, early, and whether the held batch shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvar import mini
from dvar.analysis import strategies
from dvar.analysis.stop_quality import average_concepts
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import SCORE, RecordedRun

IDENTITY, CEILING = "identity", 1.0
"""The judge's probability that an image shows this very subject, where a judge knows the subjects; and its maximum."""
MIN_ERRORS, MIN_WAY, MIN_EARLY, MIN_JITTERS = 5.0, 0.25, 0.9, 5.0
MIN_SMOOTH, MAX_GRADIENT = 0.95, 30.0
"""The share of runs that must be smooth, and how many times the median the largest gradient norm of such a run is."""
MIN_RUNS = 12
"""Runs that eligibility is computed from: four tuning concepts with three seeds each."""


@dataclass(frozen=True)
class Eligibility:
    """The gain of a method up to its cap, as means over runs of several concepts and seeds.

    Attributes:
        runs: Number of runs.
        cap: The last step that counts.
        start: Mean score at step 0.
        end: Mean score at the cap.
        ceiling: The highest possible score; nan where it is not known.
        errors: The gain over its standard error, each as a mean over concepts, since seeds of one concept are not
            independent; nan for a single concept.
        way: The gain as a share of the way from ``start`` to ``ceiling``.
        early: The share of the gain reached by half of the cap.
        jitters: The median over runs of L_det's fall, from step 0 to the last tenth of its values, over its jitter
            there: the standard deviation of first differences over the square root of 2, which is the noise of a curve
            that changes slowly.
        calm: The share of runs whose largest gradient norm is at most `MAX_GRADIENT` times their median; nan where no
            norms are known.
        below: The share of runs whose L_det is never above its first value after its minimum.
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
    calm: float = np.nan
    below: float = np.nan

    @classmethod
    def from_scores(
        cls,
        cap: int,
        steps: ArrayLike,
        scores: ArrayLike,
        losses: Sequence[NDArray[np.float64]],
        concepts: Sequence[str],
        ceiling: float = np.nan,
        gradients: Sequence[NDArray[np.float64]] = (),
    ) -> Eligibility:
        """Return the eligibility by runs that were scored at the same steps.

        Args:
            steps: Scored steps up to ``cap``, [steps].
            scores: [runs, steps].
            losses: L_det of each run.
            concepts: The concept of each run.
            gradients: The gradient norms of each run, where they are known.
        """
        curves = np.asarray(scores, np.float64)
        gains, mean = curves[:, -1] - curves[:, 0], curves.mean(axis=0)
        by_concept = average_concepts(concepts, gains.tolist())
        gain, error = float(gains.mean()), np.nan
        if len(by_concept) > 1:
            error = float(np.std(by_concept, ddof=1) / np.sqrt(len(by_concept)))
        early = float(mean[np.asarray(steps) <= cap / 2].max() - mean[0])
        with np.errstate(divide="ignore", invalid="ignore"):
            return cls(
                runs=len(curves),
                cap=cap,
                start=float(mean[0]),
                end=float(mean[-1]),
                ceiling=ceiling,
                errors=float(np.divide(np.mean(by_concept), error)),
                way=float(np.divide(gain, ceiling - mean[0])),
                early=float(np.divide(early, gain)),
                jitters=float(np.median([_fall_over_jitter(values) for values in losses])),
                calm=float(np.mean([norms.max() <= MAX_GRADIENT * np.median(norms) for norms in gradients] or np.nan)),
                below=float(np.mean([values[values.argmin() :].max() <= values[0] for values in losses])),
            )

    @classmethod
    def of_runs(cls, runs: Sequence[RecordedRun]) -> Eligibility:
        """Return the eligibility by a method's recorded runs up to Baseline's cap.

        The score is the identity if all runs have it, or else Train CLIP image, whose ceiling is not known.
        """
        has_identity = all(("train", IDENTITY) in run.image_scores for run in runs)
        metric, ceiling = (IDENTITY, CEILING) if has_identity else (SCORE, np.nan)
        cap = min(min(strategies.baseline_cap(run), run.cap) for run in runs)
        steps = runs[0].scored_steps
        steps = np.append(steps[steps < cap], cap)
        scores = []
        for run in runs:
            scored_steps, values = run.scores("train", metric)
            scores.append(np.interp(steps, scored_steps, values.mean(axis=1)))
        losses = [run.trace.values[run.trace.steps <= cap] for run in runs]
        gradients = []
        if all(run.has_series("grad_norm") for run in runs):
            gradients = [norms[at <= cap].ravel() for at, norms in (run.series("grad_norm") for run in runs)]
        return cls.from_scores(cap, steps, scores, losses, [run.concept for run in runs], ceiling, gradients)

    @property
    def failures(self) -> tuple[str, ...]:
        """The reasons why rules are not ranked, in words; a figure that is not known fails nothing."""
        early = f"it has {100 * self.early:.0f} % of its gain by half of the cap (bar {100 * MIN_EARLY:.0f})"
        bars = (
            (
                self.errors < MIN_ERRORS,
                f"its gain is {self.errors:.1f} standard errors over concepts (bar {MIN_ERRORS:g})",
            ),
            (self.way < MIN_WAY, f"it goes {100 * self.way:.0f} % of the way to the ceiling (bar {100 * MIN_WAY:.0f})"),
            (self.early < MIN_EARLY, early),
            (self.jitters < MIN_JITTERS, f"L_det falls by {self.jitters:.1f} times its jitter (bar {MIN_JITTERS:g})"),
        )
        return tuple(message for failed, message in bars if failed)

    @property
    def roughness(self) -> tuple[str, ...]:
        """The reasons why training on the model is rough, in words.

        Rules are ranked all the same, for they meet rough training in practice too; on a base model that everything is
        measured on it is a fault.
        """
        bars = (
            (
                self.calm < MIN_SMOOTH,
                f"{100 * self.calm:.0f} % of its runs have no gradient above {MAX_GRADIENT:g} times the median "
                f"(bar {100 * MIN_SMOOTH:.0f})",
            ),
            (
                self.below < MIN_SMOOTH,
                f"in {100 * self.below:.0f} % of its runs L_det stays below its first value after its minimum "
                f"(bar {100 * MIN_SMOOTH:.0f})",
            ),
        )
        return tuple(message for failed, message in bars if failed)


def judge_eligibility(archive: RecordingArchive, method: str) -> Eligibility | None:
    """Return the eligibility of a method by the archive's tuning runs.

    Returns:
        With fewer than `MIN_RUNS` tuning runs: for a bundled model the eligibility measured when its settings were
        frozen, for any other model None.
    """
    runs = archive.tuning_runs(method)
    if len(runs) >= MIN_RUNS:
        return Eligibility.of_runs(runs)
    names = {str(run.config.get("pretrained_model_name_or_path")) for run in archive.runs_of(method)}
    figures = mini.gates(*names).get(method) if len(names) == 1 else None
    return Eligibility(**figures) if figures else None


def _fall_over_jitter(values: NDArray[np.float64]) -> float:
    last = values[-max(8, len(values) // 10) :]
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.divide(values[0] - last.mean(), np.diff(last).std() / np.sqrt(2)))
