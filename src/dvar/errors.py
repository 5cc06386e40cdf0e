"""The exceptions of dvar, and the pieces of their messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

# DvarError
# ├── RefusedInput     (ValueError)       settings, images or files that cannot be used, all problems at once
# │   └── FolderInUse                     a folder that another process is writing
# ├── TraceError       (ValueError)       a record or a trace file that breaks the order or the shape of a trace
# ├── CheckpointError                     a checkpoint that is damaged, or made under other settings
# ├── ModelError                          a model folder or hub id that cannot be loaded or does not fit
# │   └── UnreachableModel                a model that cannot be fetched now
# ├── OutOfResources                      memory or disk that ran out while training
# ├── ProcessLost                         one of several processes that train a run has ended or hangs
# └── NonFiniteLoss    (ArithmeticError)  a loss that is nan or infinite while training
#
# Each message is one line: the rule, the value received, the remedy.


class DvarError(Exception):
    """The base class of everything that dvar raises on purpose."""


class RefusedInput(DvarError, ValueError):
    """Input that is refused before any slow work; `str()` gives one problem a line.

    Attributes:
        problems: Every problem, in the order of the checks.
    """

    problems: tuple[str, ...]

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(self.problems)


class FolderInUse(RefusedInput):
    """A folder that another process is writing: the same may be accepted later."""


class TraceError(DvarError, ValueError):
    """A record that cannot follow the ones before it, or a file that is not a trace."""


class CheckpointError(DvarError):
    """A checkpoint from which a run cannot be resumed."""


class ModelError(DvarError):
    """A model that cannot be loaded, or is of a kind that is not supported."""


class UnreachableModel(ModelError):
    """A model on the hub that cannot be fetched now: the same may be accepted later."""


class OutOfResources(DvarError):
    """Memory ran out while training, or a file of the run could not be written."""


class ProcessLost(DvarError):
    """A run that several processes train has lost one of them."""


class NonFiniteLoss(DvarError, ArithmeticError):
    """A loss or a weight that is not a finite number."""


_NEAR = 0.65
"""The ratio of difflib from which a word may be a slip for another; that of "tabby" and "table" is 0.6."""


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the one of ``words`` that ``word`` may be a slip for; an empty text where none is near."""
    return next(iter(difflib.get_close_matches(word, words, n=1, cutoff=_NEAR)), "")


def suggest(word: str, words: Iterable[str]) -> str:
    """Return that one of ``words`` is the nearest to ``word``, or where none is near, all of them to choose from."""
    words = list(words)
    near = nearest(word, words)
    return f"the nearest is {near}" if near else f"choose one of {', '.join(words)}"


def name_some(names: Sequence[str]) -> str:
    """Return the first three of some names, and how many more there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def describe_error(error: Exception) -> str:
    """Return the type of an error and the first line of its message; of one of ours, its message."""
    return str(error) if isinstance(error, DvarError) else f"{type(error).__name__}: {first_line(error)}"
