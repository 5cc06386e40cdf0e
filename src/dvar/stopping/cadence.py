"""How often something is measured along a run: every so many steps, or so many times in each doubling of the steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dvar.errors import RefusedInput


@dataclass(frozen=True)
class PerOctave:
    """A cadence of ``count`` measurements in each doubling of the steps.

    The steps are spaced by a constant factor; where it is less than one step, every step is measured: with 16 an octave
    those up to 27. A step is due or not whatever the length of the run.

    Args:
        count: At least 1.
        first: The first step after step 0 at which one is due, 0 or more.

    Raises:
        RefusedInput: ``count`` is out of its range.
    """

    count: int
    first: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise RefusedInput([f"a cadence is of 1 or more measurements an octave, got {self.count!r}"])
        if not isinstance(self.first, int) or isinstance(self.first, bool) or self.first < 0:
            raise RefusedInput([f"a cadence begins at a step, 0 or more, got {self.first!r}"])

    def __str__(self) -> str:
        return f"{self.count} times an octave" + (f" from step {self.first} on" if self.first else "")


Cadence = int | PerOctave
"""Steps between two measurements, or measurements in each doubling of the steps."""


def is_due(cadence: Cadence, step: int) -> bool:
    """Return whether a measurement is due at ``step``; at step 0, the untouched model, one always is."""
    if isinstance(cadence, int):
        return step % cadence == 0
    if 0 < step < cadence.first:
        return False
    if step < 2 or step == cadence.first:
        return True
    return math.floor(cadence.count * math.log2(step)) > math.floor(cadence.count * math.log2(step - 1))


def count_due(cadence: Cadence, last_step: int) -> int:
    """Return the number of measurements that are due from step 0 to ``last_step``."""
    return sum(is_due(cadence, step) for step in range(last_step + 1))


def format_cadence(cadence: Cadence) -> str:
    """Return a cadence in words, such as "every 10 steps"."""
    return str(cadence) if isinstance(cadence, PerOctave) else f"every {cadence}"
