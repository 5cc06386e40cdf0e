"""A program for workers that share a process: a task is a list of things to do, one at each turn."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dvar.cluster.program import End, serve_team
from dvar.errors import OutOfResources, RefusedInput


class Scripts:
    """Tasks that take turns; "wait" goes on for as many turns as it takes."""

    def __init__(self) -> None:
        self.tasks: dict[str, tuple[list[Any], Callable[..., None]]] = {}
        self.cancelled: set[str] = set()

    def __len__(self) -> int:
        return len(self.tasks)

    def add(self, name: str, argument: str, report: Callable[..., None]) -> None:
        task = json.loads(argument)
        with Path(task["attempts"]).open("a") as file:
            file.write(f"{os.getpid()}\n")
        number = len(Path(task["attempts"]).read_text().splitlines()) - 1
        self.tasks[name] = (list(task["turns"][min(number, len(task["turns"]) - 1)]), report)

    def cancel(self, name: str) -> None:
        self.cancelled.add(name)

    def advance(self) -> Mapping[str, End]:
        ends: dict[str, End] = {}
        for name, (turns, report) in self.tasks.items():
            step: tuple[str, Any] = turns.pop(0) if turns else ("done", "")
            word, value = step
            match word:
                case "done":
                    ends[name] = {"pid": os.getpid(), "beside": len(self.tasks)}
                case "report":
                    report(step=value)
                case "print":
                    print(value)
                case "fail":
                    ends[name] = OutOfResources(value)
                case "refuse":
                    ends[name] = RefusedInput([value])
                case "crash":
                    ends[name] = ZeroDivisionError(value)
                case "kill":
                    os.kill(os.getpid(), value)
                case "meet" if not Path(value).exists():
                    turns.insert(0, (word, value))
                case "mark":
                    Path(value).write_text("")
                case "wait" if name not in self.cancelled:
                    Path(value).write_text("")
                    turns.insert(0, (word, value))
                case "wait":
                    Path(value).with_suffix(".saved").write_text("")
                    ends[name] = KeyboardInterrupt()
        for name in ends:
            del self.tasks[name]
        return ends


if __name__ == "__main__":
    sys.exit(serve_team(Scripts()))
