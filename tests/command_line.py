"""The command line, called within the test's process."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from dvar.cli.main import main


@dataclass(frozen=True)
class Answer:
    """What a command returned and printed."""

    status: int
    out: str
    err: str


def dvar(*words: object) -> Answer:
    """Run ``dvar`` with these words."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in words])
    return Answer(status, out.getvalue(), err.getvalue())
