"""A program for a pool of workers: a task is a list of things to do."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dvar.cluster.program import serve
from dvar.errors import OutOfResources, RefusedInput


def run(argument: str, report: Callable[..., None]) -> Mapping[str, Any]:
    """Do each thing of a task; of several lists, the one whose turn it is, counted by the lines of a file."""
    task = json.loads(argument)
    attempts = Path(task["attempts"])
    with attempts.open("a") as file:
        file.write(f"{os.getpid()}\n")
    number = len(attempts.read_text().splitlines()) - 1
    for word, value in task["turns"][min(number, len(task["turns"]) - 1)]:
        match word:
            case "print":
                print(value)
            case "report":
                report(step=value)
            case "fail":
                raise OutOfResources(value)
            case "refuse":
                raise RefusedInput([value])
            case "crash":
                raise ZeroDivisionError(value)
            case "kill":
                os.kill(os.getpid(), value)
            case "exit":
                os._exit(value)
            case "wait":
                wait_for_sigterm(Path(value))
    return {"pid": os.getpid()}


def wait_for_sigterm(mark: Path) -> None:
    """Say in a file that the task is running; where it is asked to stop, say so too."""

    def save(*_: object) -> None:
        mark.with_suffix(".saved").write_text("")
        raise KeyboardInterrupt

    handler = signal.signal(signal.SIGTERM, save)
    mark.write_text(str(os.getpid()))
    try:
        time.sleep(60)
    finally:
        signal.signal(signal.SIGTERM, handler)


if __name__ == "__main__":
    sys.exit(serve(run))
