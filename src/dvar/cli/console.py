"""Messages and exit statuses of the command line."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

REFUSED, FAILED, INTERRUPTED = 2, 1, 130
READER_GONE = 141
"""The status that shells report of a program ended by SIGPIPE, 128 + 13."""


def program_name() -> str:
    """Return how this program is called by whoever started it, for commands to type: "dvar" where a shell finds it."""
    started = sys.argv[0]
    if Path(started).parts[-2:] == ("dvar", "__main__.py"):
        return "python -m dvar"
    if Path(started).stem != "dvar" or shutil.which("dvar") in (started, str(Path(started).absolute())):
        return "dvar"
    return shlex.quote(started)


def prepare_streams() -> None:
    """Have standard output and error take whatever is printed: closed ones drop it, others escape what they lack."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, or of a program without a console
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (as long as the program)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def print_message(message: str) -> None:
    """Print one line to standard error, if anything can be written there."""
    with suppress(OSError):
        print(f"dvar: {message}", file=sys.stderr, flush=True)


def print_messages(messages: Iterable[str]) -> None:
    """Print lines to standard error."""
    for message in messages:
        print_message(message)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line to standard error, in the place of `warnings.showwarning`."""
    with suppress(OSError):
        print(f"warning: {message}", file=sys.stderr)


def flush_output() -> None:
    """Write out what was printed, and drop it where that fails, as on a full disk."""
    try:
        sys.stdout.flush()
    except OSError:
        discard_output()


def discard_output() -> None:
    """Drop what is still to be written to standard output, once nothing can be written there."""
    # The interpreter flushes standard output at its end, and would complain about the broken pipe.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
