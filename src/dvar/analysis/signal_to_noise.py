"""How much a loss curve tells of learning: its fall against its jitter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

CLEAR = 5.0
"""Standard errors from which a fall counts as seen."""
MANY = 10_000
"""Steps from which a count says no more than that there are too many."""


@dataclass(frozen=True)
class SignalToNoise:
    """What a curve tells.

    ``gain`` is the first tenth of its records, or the first one of a curve measured on held draws, less the mean of the
    last tenth; ``jitter`` the standard deviation of one record about a curve that moves slowly.
    """

    gain: float
    jitter: float
    cadence: float

    @property
    def ratio(self) -> float:
        """The gain in units of the jitter; infinite for a fall without any jitter, 0 without a fall."""
        if self.gain <= 0:
            return 0.0
        return self.gain / self.jitter if self.jitter else math.inf

    @property
    def steps_to_detect(self) -> float:
        """Steps that must be averaged, before and after, to see the gain at `CLEAR` standard errors.

        Two means of n records differ by the gain with the standard error jitter sqrt(2 / n), so n = 2 (5 / ratio)^2,
        and one record at least; infinite without a fall.
        """
        if not self.ratio:
            return math.inf
        return max(1.0, 2 * (CLEAR / self.ratio) ** 2) * self.cadence

    @property
    def steps_told(self) -> str:
        """The same for a table; a number that no run comes near is only said to be large."""
        steps = self.steps_to_detect
        return "never" if math.isinf(steps) else f"{steps:.0f}" if steps < MANY else f"over {MANY}"


def information(steps: ArrayLike, values: ArrayLike) -> SignalToNoise:
    """What a curve tells: its fall from the first to the last tenth, and its jitter from first differences.

    The standard deviation of first differences over sqrt(2) is the noise of independent records about any trend that is
    slow beside the cadence, so nothing has to be fitted.

    Source: none; the paper's Figure 5 is judged by eye.
    """
    at, y = np.asarray(steps, np.float64), np.asarray(values, np.float64)
    tenth = max(1, len(y) // 10)
    jitter = float(np.std(np.diff(y)) / math.sqrt(2)) if len(y) > 2 else math.nan
    # The fall is fastest at its start: of a curve with little jitter the first record is the height it falls from.
    first = float(y[0]) if abs(float(y[0] - y[:tenth].mean())) > 3 * jitter else float(y[:tenth].mean())
    return SignalToNoise(
        first - float(y[-tenth:].mean()), jitter, float(np.median(np.diff(at))) if len(at) > 1 else 1.0
    )
