"""The step at which DVAR is likely to stop a run, with an interval, from the decline of its ratio so far."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

MIN_RATIOS = 4
"""Ratios that a prediction needs, within the last half of a window."""
FARTHEST = 10
"""Windows ahead, beyond which a line says nothing."""
EARLIEST, LATEST = 0.25, 7.0
"""The interval, in multiples of the steps that the line leaves.

They are the quantiles 0.1 and 0.9 of (steps left) / (steps left by the line) at nine moments of each of the 84 runs in
docs/traces.npz. The residuals of the line say much less than is true: the interval of 80 % that they give, corrected
for autocorrelation, holds 44 % of the stops, because a ratio does not fall in a line for long (LOG.md).
"""


@dataclass(frozen=True)
class StopPrediction:
    """The step at which DVAR is likely to stop, if the run goes on as it did lately.

    Attributes:
        step: The step at which the line of the ratio meets the threshold.
        low: The step before which one run in ten stops.
        high: The step after which one run in ten stops.
    """

    step: int
    low: int
    high: int


def predict_stop(steps: ArrayLike, ratios: ArrayLike, window: int, threshold: float) -> StopPrediction | None:
    """Return when DVAR is likely to stop, by a line through the logarithm of its ratio over the last half window.

    There is no answer before the ratio has four values, where it hardly falls, and where it is below the threshold
    already: then a doubt about the curve holds the stop back, and nobody knows for how long.

    Args:
        steps: [n] steps of the evaluations, in rising order.
        ratios: [n] DVAR's ratio after each of them; nan where it had none yet.
        window: DVAR's window.
        threshold: DVAR's threshold.

    Source: none; LOG.md has the coverage on recorded runs.
    """
    all_steps, all_ratios = np.asarray(steps, dtype=np.float64), np.asarray(ratios, dtype=np.float64)
    usable = np.isfinite(all_ratios) & (all_ratios > 0)
    if not usable.any():
        return None
    now = all_steps[usable][-1]
    recent = usable & (all_steps > now - window / 2)
    x, y = all_steps[recent], np.log(all_ratios[recent]) - math.log(threshold)
    if len(x) < MIN_RATIOS or y[-1] <= 0:
        return None
    ages = x - x.mean()
    slope = float(np.dot(ages, y) / np.dot(ages, ages))
    if -slope * FARTHEST * window < y[-1]:
        return None
    # A line that has met the threshold already says that the stop is near: at least a record away.
    left = max(x.mean() - y.mean() / slope - now, x[-1] - x[-2])
    return StopPrediction(*(round(now + factor * left) for factor in (1.0, EARLIEST, LATEST)))
