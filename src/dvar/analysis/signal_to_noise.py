"""Signal-to-noise ratio of loss curves: how far they fall, relative to their jitter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CLEAR_ERRORS = 5.0
"""Standard errors from which a fall counts as detected."""
MANY_STEPS = 10_000
"""More steps than this are shown as too many, without their number."""


@dataclass(frozen=True)
class SignalToNoise:
    """The fall of a loss curve and its jitter: how much of learning it shows.

    Attributes:
        gain: The fall of the curve. It starts at the mean of the first tenth of its values, or at the first value of a
            curve with little jitter, and ends at the mean of the last tenth.
        jitter: The standard deviation of one value about a curve that changes slowly.
        cadence: Steps between two values.
    """

    gain: float
    jitter: float
    cadence: float

    @property
    def ratio(self) -> float:
        """The gain in units of the jitter; infinite for a fall without jitter, 0 without a fall."""
        if self.gain <= 0:
            return 0.0
        return self.gain / self.jitter if self.jitter else math.inf

    @property
    def steps_to_detect(self) -> float:
        """Steps that must be averaged, before and after, to detect the gain; infinite without a fall.

        Two means of n values differ by the gain with the standard error jitter sqrt(2 / n), so that it takes
        n = 2 (`CLEAR_ERRORS` / ratio)^2 values, and one at least.
        """
        if not self.ratio:
            return math.inf
        return max(1.0, 2 * (CLEAR_ERRORS / self.ratio) ** 2) * self.cadence

    @property
    def steps_label(self) -> str:
        """`steps_to_detect` for a table."""
        steps = self.steps_to_detect
        return "never" if math.isinf(steps) else f"{steps:.0f}" if steps < MANY_STEPS else f"over {MANY_STEPS}"


def measure_signal_to_noise(steps: ArrayLike, values: ArrayLike) -> SignalToNoise:
    """Return how much a curve shows of learning.

    The jitter is the standard deviation of first differences over sqrt(2): the noise of independent values about any
    trend that is slow relative to the cadence, so that nothing has to be fitted.

    Args:
        steps: Steps, [n].
        values: Losses, [n].

    Source: none; the paper's Figure 5 is judged by eye.
    """
    x, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    tenth = max(1, len(y) // 10)
    jitter = float(np.std(np.diff(y)) / math.sqrt(2)) if len(y) > 2 else math.nan
    # The fall is fastest at its start: a curve with little jitter falls from its first value.
    first = float(y[0]) if abs(float(y[0] - y[:tenth].mean())) > 3 * jitter else float(y[:tenth].mean())
    cadence = float(np.median(np.diff(x))) if len(x) > 1 else 1.0
    return SignalToNoise(first - float(y[-tenth:].mean()), jitter, cadence)
