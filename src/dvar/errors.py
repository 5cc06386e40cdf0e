"""Everything `dvar` raises on purpose, so that one `except dvar.DvarError` catches it all.

    DvarError
    ├── RefusedInput     (ValueError)       settings, pictures or files that cannot be used, all problems at once
    ├── TraceError       (ValueError)       a record or a trace file that breaks the order or the shape of a trace
    ├── CheckpointError                     a checkpoint that is damaged, or made under other settings
    ├── ModelError                          a model folder or hub id that cannot be loaded or does not fit
    ├── OutOfResources                      memory or disk that ran out while training
    └── NonFiniteLoss    (ArithmeticError)  a loss that is nan or infinite while training

Each message is one line: the rule, the value received, the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DvarError(Exception):
    """The root of the tree."""


class RefusedInput(DvarError, ValueError):
    """Input that is refused before any slow work; `str()` gives one problem per line."""

    problems: tuple[str, ...]
    """Every problem that was found, in the order of finding."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class TraceError(DvarError, ValueError):
    """A record that cannot follow the ones before it, or a file that is no trace."""


class CheckpointError(DvarError):
    """A checkpoint that cannot be continued from."""


class ModelError(DvarError):
    """A model that cannot be loaded, or is not of the expected make."""


class OutOfResources(DvarError):
    """Training ran out of memory, or could not write to its folder."""


class NonFiniteLoss(DvarError, ArithmeticError):
    """Training met a loss that is not a finite number."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like ``word``, however unlike."""
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
