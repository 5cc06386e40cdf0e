"""The answers of `dvar launch --check`: which scripts of a folder can be measured."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvar.errors import RefusedInput, first_line
from dvar.files import read_content
from dvar.launch.script import TrainingScript, script_problems

INSTALLED = ("site-packages", "dist-packages", "node_modules")


@dataclass(frozen=True)
class ScriptCheck:
    """The answer for one script.

    Attributes:
        name: The script, as it is shown.
        loop: Where the loop is and what it iterates over; empty where there is none.
        loss: The loss that is measured, with its line.
        problem: Why the script cannot be measured; empty where it can.
    """

    name: str
    loop: str
    loss: str
    problem: str

    @property
    def fits(self) -> bool:
        """Whether the script can be measured."""
        return not self.problem

    @property
    def sentence(self) -> str:
        """The answer in one line."""
        return f"{self.name}: {self.problem or f'can be measured; loop {self.loop}, loss {self.loss}'}"


def check_script(path: Path, name: str = "") -> ScriptCheck:
    """Return the answer for a script, from its source alone.

    Raises:
        RefusedInput: The file cannot be read, or is not Python.
    """
    script = TrainingScript.read(path)
    problem = "; ".join(script_problems(script)).removeprefix(f"{path.name}: ")
    loop = next(iter(script.measurable_loops or script.loops), None)
    if loop is None:
        return ScriptCheck(name or path.name, "", "", problem)
    place = "" if loop.path.name == path.name else f"{loop.path.name} "
    return ScriptCheck(
        name or path.name,
        f"{place}{loop.line}: {loop.iterable}",
        f"{loop.loss_line}: {loop.loss}",
        problem,
    )


def check_folder(folder: Path) -> Iterator[ScriptCheck]:
    """Yield the answer for each file below a folder that has a backward pass, without what is installed there."""
    for path in sorted(_iter_sources(folder)):
        name = str(path.relative_to(folder))
        try:
            if b".backward(" in read_content(path):
                yield check_script(path, name)
        except (RefusedInput, OSError) as error:
            yield ScriptCheck(name, "", "", first_line(error))


def _iter_sources(folder: Path) -> Iterator[Path]:
    """Yield the Python files below a folder; hidden folders, environments and packages in them are left out."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_installed(Path(parent, name))]
        yield from (Path(parent, name) for name in files if name.endswith(".py"))


def _is_installed(folder: Path) -> bool:
    return folder.name.startswith(".") or folder.name in INSTALLED or (folder / "pyvenv.cfg").is_file()
