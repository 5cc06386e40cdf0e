"""A training script and the modules of its own that it imports, read without running them."""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import read_content
from dvar.launch.loops import TrainingLoop, find_training_loops

MOST_MODULES = 500
"""Modules of a script that are read at most."""


@dataclass(frozen=True)
class TrainingScript:
    """A script as far as its source tells.

    Attributes:
        path: The file.
        loops: The loops with a backward pass, in the script and in the modules of its own.
    """

    path: Path
    loops: tuple[TrainingLoop, ...]

    @classmethod
    def read(cls, path: Path) -> TrainingScript:
        """Read a script.

        Raises:
            RefusedInput: The file cannot be read, or is not Python.
        """
        if path.is_dir():
            raise RefusedInput(f"a script is a Python file, got the folder {path}: name a file, or add --check")
        try:
            tree = ast.parse(read_content(path), str(path))
        except OSError as error:
            raise RefusedInput(f"script {path} cannot be read: {error.strerror or error}; check its path") from error
        except (SyntaxError, ValueError) as error:
            raise RefusedInput(f"script {path} is not Python: {error}; check its path") from error
        except (RecursionError, MemoryError) as error:  # Python's parser itself
            raise RefusedInput(f"script {path} is nested too deeply for Python; check its path") from error
        loops = find_training_loops(tree, path)
        for module, module_tree in _iter_own_modules(tree, path):
            loops += find_training_loops(module_tree, module)
        return cls(path, tuple(loops))

    @property
    def measurable_loops(self) -> tuple[TrainingLoop, ...]:
        """The loops through which held batches can pass."""
        return tuple(loop for loop in self.loops if not loop.problem)


def script_problems(script: TrainingScript) -> list[str]:
    """Return why a script cannot be measured."""
    if script.measurable_loops:
        return []
    if script.loops:
        return [f"{script.loops[0].path.name}: {script.loops[0].problem}"]
    return [
        "a script is measured at a call of accelerator.backward(loss) in a for loop, got none in "
        f"{script.path.name} or its own modules: call a StopMonitor in the script, "
        "as docs/guides/add-it-to-your-loop.md shows"
    ]


def is_own_module(path: Path) -> bool:
    """Return whether a module belongs to the user, and neither to an installed package nor to Python."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    path = path.resolve()
    return path.suffix == ".py" and not installed & {*path.parents} and Path(__file__).parents[1] not in path.parents


def _iter_own_modules(tree: ast.AST, path: Path) -> Iterator[tuple[Path, ast.AST]]:
    """Yield the modules of its own that a script imports, directly or through one another, with their trees."""
    folders = [path.resolve().parent, *(Path(entry) for entry in sys.path if entry)]
    waiting, seen = list(_iter_imported_files(tree, path, folders)), {path.resolve()}
    while waiting and len(seen) < MOST_MODULES:
        module = waiting.pop(0).resolve()
        if module in seen or not is_own_module(module):
            continue
        seen.add(module)
        try:
            module_tree = ast.parse(read_content(module), str(module))
        except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # the script itself will report it, if it matters
        yield module, module_tree
        waiting += _iter_imported_files(module_tree, module, folders)


def _iter_imported_files(tree: ast.AST, path: Path, folders: list[Path]) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            places = folders
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            names = [source, *(f"{source}.{alias.name}".strip(".") for alias in node.names)]
            places = [path.resolve().parents[node.level - 1]] if node.level else folders
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if name and (places is not folders or top not in sys.stdlib_module_names):
                yield from _find_module(name, places)


def _find_module(name: str, folders: list[Path]) -> Iterator[Path]:
    """Yield the files of a module, and those of the packages that it is in."""
    parts = name.split(".")
    for folder in folders:
        file = folder.joinpath(*parts).with_suffix(".py")
        if file.is_file():
            yield file
        packages = [folder.joinpath(*parts[:end], "__init__.py") for end in range(1, len(parts) + 1)]
        if packages[0].is_file() or file.is_file():
            yield from (package for package in packages if package.is_file())
            return
