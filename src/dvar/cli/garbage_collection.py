"""When Python collects garbage while a command loads a model and works with it."""

# What is imported and loaded is half a million objects, none of them garbage. Python looks through them again and again
# while they are made, and once more when it ends: a fifth of the processor time of a start (Python 3.11).

from __future__ import annotations

import atexit
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

LOADING_THRESHOLD = 20_000
"""New objects between two collections while a command loads; Python's own number is 700 to 2,000."""


@contextmanager
def collecting_late() -> Iterator[Callable[[object], None]]:
    """Collect garbage rarely until training begins, if it does, and not at all when the process ends.

    Yields:
        A consumer of steps: the first one says that training begins.
    """
    thresholds = gc.get_threshold()

    def begin(_step: object) -> None:
        gc.set_threshold(*thresholds)

    atexit.register(gc.freeze)
    gc.set_threshold(LOADING_THRESHOLD, *thresholds[1:])
    try:
        yield begin
    finally:
        gc.set_threshold(*thresholds)
