"""Messages and exit statuses of the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
READER_GONE = 141
"""The status that shells report of a program ended by SIGPIPE, 128 + 13."""


def print_message(message: str) -> None:
    """Print one line to standard error."""
    print(f"dvar: {message}", file=sys.stderr, flush=True)


def print_messages(messages: Iterable[str]) -> None:
    """Print lines to standard error."""
    for message in messages:
        print_message(message)


def discard_output() -> None:
    """Drop what is still to be written to standard output, once the program that reads it has ended."""
    # The interpreter flushes standard output at its end, and would complain about the broken pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
