"""The rules of the house, read from the source: which room may import which, what stays light, what is never loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dvar

HOUSE = Path(dvar.__file__).parent

# Imports point to a room of a lower number, or stay within the room.  The face (`dvar` itself) is on top.
FLOORS = {
    "_version": 0,
    "errors": 0,
    "extras": 0,
    "files": 0,
    "registry": 1,
    "html": 1,
    "mini": 2,
    "stopping": 3,
    "config": 4,
    "diffusion": 5,
    "training": 6,
    "runs": 7,
    "recordings": 8,
    "analysis": 9,
    "survey": 10,
    "paper": 11,
    "testing": 12,
    "cli": 13,
    "__main__": 14,
    "__init__": 14,
}
PURE = (
    "errors",
    "files",
    "registry",
    "config.fields",
    "config.templates",
    "config.training",
    "paper.config",
    "recordings.config",
    "recordings.protocol",
    "runs.config",
    "survey.config",
    "stopping.combinators",
    "stopping.curve",
    "stopping.diagnosis",
    "stopping.monitor",
    "stopping.rule",
    "stopping.rules",
    "stopping.trace",
    "stopping.trace_format",
    "stopping.verdict",
)
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "PIL",
    "matplotlib",
    "scipy",
    "rich",
    "cyclopts",
    "skia",
)
IMPORTERS = ("import_module", "__import__", "import_string", "resolve_name")
TORCH_PICKLERS = ("load", "save", "hub")
PICKLERS = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


# --- reading the source ---------------------------------------------------------------------------------------------


def modules(house: Path) -> dict[str, ast.Module]:
    """The parsed modules by their name inside the house: "stopping.trace", "stopping.__init__", "__init__"."""
    files = sorted(house.rglob("*.py"))
    return {".".join(path.relative_to(house).with_suffix("").parts): ast.parse(path.read_bytes()) for path in files}


def imports(name: str, tree: ast.AST, known: frozenset[str]) -> Iterator[str]:
    """Every import in the module, wherever it stands: "numpy.typing", or "dvar.stopping.trace" for our own."""
    package = ["dvar", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            source = source if node.level else str(node.module)
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                is_module = whole.removeprefix("dvar.") in known or f"{whole.removeprefix('dvar.')}.__init__" in known
                yield whole if is_module or source == "dvar" else source


def room(name: str) -> str:
    return name.split(".")[0]


def own(target: str) -> str | None:
    """What is imported of our own, by its name inside the house; the face as "__init__"."""
    if target != "dvar" and not target.startswith("dvar."):
        return None
    return target.removeprefix("dvar").removeprefix(".") or "__init__"


def all_imports(house: Path) -> Iterator[tuple[str, str]]:
    trees = modules(house)
    for name, tree in trees.items():
        yield from ((name, target) for target in imports(name, tree, frozenset(trees)))


def pointing_up(house: Path) -> list[str]:
    """The imports that point to a higher room; anything may read the version."""
    found = []
    for name, target in all_imports(house):
        inside = own(target)
        if inside is None or inside == "__version__" or room(inside) == room(name):
            continue
        if FLOORS.get(room(inside), FLOORS["__init__"]) >= FLOORS[room(name)]:
            found.append(f"{name} imports {target}")
    return found


def impure(house: Path) -> list[str]:
    """The imports of the pure rooms that are not of the standard library, numpy or another pure room."""
    allowed = {*sys.stdlib_module_names, "numpy"}
    return [
        f"{name} imports {target}"
        for name, target in all_imports(house)
        if name in PURE and room(target) not in allowed and own(target) not in PURE
    ]


def busy_doors(house: Path) -> list[str]:
    """The wings whose `__init__` does more than say what they are: importing one room would load others."""
    return [
        name
        for name, tree in modules(house).items()
        if name.endswith(".__init__")
        and room(name) != "mini"
        and not (len(tree.body) <= 1 and all(isinstance(node, ast.Expr) for node in tree.body))
    ]


def unpickling(house: Path) -> list[str]:
    """The places that could run code out of a file."""
    found = [f"{name} imports {target}" for name, target in all_imports(house) if room(target) in PICKLERS]
    for name, tree in modules(house).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [f"{name} imports torch.{alias.name}" for alias in node.names if alias.name in TORCH_PICKLERS]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in {f"torch.{word}" for word in TORCH_PICKLERS}:
                found.append(f"{name} uses {ast.unparse(node)}")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                found.append(f"{name} allows pickle")
    return found


def resolving_strings(house: Path) -> list[str]:
    """The places that import what a string names."""
    found = []
    for name, tree in modules(house).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in IMPORTERS:
                found.append(f"{name} uses {ast.unparse(node)}")
            elif isinstance(node, ast.alias) and node.name.split(".")[-1] in IMPORTERS:
                found.append(f"{name} imports {node.name}")
    return found


def circles(house: Path) -> list[set[str]]:
    """The groups of modules of which each imports the others, directly or through one another."""
    targets: dict[str, set[str]] = {}
    for name, target in all_imports(house):
        targets.setdefault(name, set()).add(own(target) or "")

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = set(targets.get(start, ()))
        while waiting:
            name = waiting.pop()
            seen.add(name)
            waiting |= targets.get(name, set()) - seen
        return seen

    reaches = {name: reached(name) for name in targets}
    groups = [{other for other in targets if other in reaches[name] and name in reaches[other]} for name in targets]
    return [group for index, group in enumerate(groups) if len(group) > 1 and group not in groups[:index]]


def shares(house: Path) -> dict[str, float]:
    """The share of all lines that each package has."""
    lines: dict[str, int] = {}
    for path in house.rglob("*.py"):
        package = path.relative_to(house).parts[0]
        lines[package] = lines.get(package, 0) + path.read_text(encoding="utf-8").count("\n")
    return {package: count / sum(lines.values()) for package, count in lines.items()}


def loaded_by(statement: str, *paths: Path) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    path = os.pathsep.join(str(part) for part in (*paths, HOUSE.parent))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


# --- our own house --------------------------------------------------------------------------------------------------


def test_imports_point_one_way() -> None:
    assert pointing_up(HOUSE) == []


def test_every_room_has_its_floor() -> None:
    assert {room(name) for name in modules(HOUSE)} <= set(FLOORS)


def test_pure_rooms_need_the_standard_library_and_numpy_alone() -> None:
    assert impure(HOUSE) == []
    assert set(PURE) <= set(modules(HOUSE))


def test_the_door_of_a_wing_loads_nothing() -> None:
    assert busy_doors(HOUSE) == []


def test_nothing_unpickles() -> None:
    assert unpickling(HOUSE) == []


def test_nothing_is_resolved_by_importing_a_string() -> None:
    assert resolving_strings(HOUSE) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles(HOUSE) == []


def test_no_package_outgrows_the_others() -> None:
    assert {package: share for package, share in shares(HOUSE).items() if share > 0.15} == {}


def test_importing_dvar_loads_nothing_heavy() -> None:
    assert loaded_by("import dvar; dvar.Dvar(310, 0.15)(dvar.Trace())") == set()


def test_the_public_face_is_exactly_all() -> None:
    tree = modules(HOUSE)["__init__"]
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if not (alias.asname or "").startswith("_")
    }
    assert imported - {"annotations"} == set(dvar.__all__)
    assert dvar.__all__ == sorted(dvar.__all__) == dir(dvar)
    assert len(set(dvar.__all__)) == len(dvar.__all__)


@pytest.mark.parametrize("name", dvar.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dvar, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dvar.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_whose_package_is_missing_tells_what_to_install() -> None:
    hidden = "import sys; sys.modules['torch'] = None; import dvar"
    program = f"{hidden}\ntry: dvar.Probe\nexcept ImportError as error: print(error)"
    environment = {**os.environ, "PYTHONPATH": str(HOUSE.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "dvar.Probe needs torch: pip install 'dvar[train]'"


# --- planted offenders: each check must be able to fail -------------------------------------------------------------


def planted(tmp_path: Path, **files: str) -> Path:
    """A house with the given modules; "stopping__trace" stands for stopping/trace.py."""
    for name, text in files.items():
        path = tmp_path.joinpath(*name.replace("__", "/").split("/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "offence",
    [
        "import dvar.training.loop",
        "from dvar.training.loop import train",
        "from dvar.training import loop",
        "from dvar import training",
        "from dvar import Probe",
        "import dvar",
        "from ..training import loop",
        "from ..training.loop import train",
        "from .. import training",
        "def later():\n    import dvar.training.loop",
        "if TYPE_CHECKING:\n    from dvar.training.loop import Step",
        "import dvar.new_wing",
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, offence: str) -> None:
    house = planted(tmp_path, diffusion__objective=offence, training__loop="import torch")
    (house / "training" / "__init__.py").write_text("")
    assert len(pointing_up(house)) == 1
    assert pointing_up(house)[0].startswith("diffusion.objective imports dvar")


def test_imports_that_point_down_or_stay_in_the_room_are_not_offences(tmp_path: Path) -> None:
    down = "import numpy\nfrom dvar.errors import DvarError\nfrom . import verdict, trace"
    house = planted(tmp_path, stopping__rules=down, stopping__trace="", stopping__verdict="", errors="")
    planted(tmp_path, training__run="from dvar import __version__", cli="from dvar.runs import report")
    assert pointing_up(house) == [] == impure(house)


@pytest.mark.parametrize(
    "offence",
    [
        "import torch",
        "import scipy.stats",
        "def f():\n    from PIL import Image",
        "from dvar.stopping.probe import Probe",
        "from .probe import Probe",
        "from . import probe",
    ],
)
def test_an_impure_import_in_a_pure_room_is_found(tmp_path: Path, offence: str) -> None:
    house = planted(tmp_path, stopping__verdict=offence, stopping__probe="import torch")
    assert len(impure(house)) == 1
    assert impure(house)[0].startswith("stopping.verdict imports ")


def test_a_door_that_loads_a_room_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, stopping__rules="")
    door = house / "stopping" / "__init__.py"
    door.write_text('"""The stopping."""\n')
    assert busy_doors(house) == []
    door.write_text('"""The stopping."""\nfrom dvar.stopping.rules import Dvar\n')
    assert busy_doors(house) == ["stopping.__init__"]


@pytest.mark.parametrize(
    "offence",
    [
        "import pickle",
        "import joblib",
        "from pickle import loads",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "import torch\nread = torch.load",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
    ],
)
def test_unpickling_is_found(tmp_path: Path, offence: str) -> None:
    assert len(unpickling(planted(tmp_path, training__checkpoint=offence))) == 1
    assert unpickling(planted(tmp_path, training__checkpoint="import numpy\nnumpy.load('x', allow_pickle=False)")) == []


@pytest.mark.parametrize(
    "offence",
    [
        "from importlib import import_module",
        "import importlib\nimportlib.import_module('dvar.stopping.rules')",
        "found = __import__('dvar')",
        "from pkgutil import resolve_name",
    ],
)
def test_importing_a_string_is_found(tmp_path: Path, offence: str) -> None:
    assert len(resolving_strings(planted(tmp_path, paper__reproduce=offence))) == 1
    assert resolving_strings(planted(tmp_path, paper__reproduce="import importlib.resources")) == []


def test_a_circle_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, training__run="import dvar.training.loop", training__loop="", errors="")
    assert circles(house) == []
    planted(
        tmp_path,
        training__loop="from dvar.training.dataset import read",
        training__dataset="def later():\n import dvar.training.run",
    )
    assert circles(house) == [{"training.run", "training.loop", "training.dataset"}]


def test_a_package_that_outgrows_the_others_is_found(tmp_path: Path) -> None:
    house = planted(tmp_path, paper__page="x = 1\n" * 20, errors="x = 1\n" * 80)
    assert shares(house) == {"paper": 0.2, "errors.py": 0.8}


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    planted(tmp_path, torch="", offender="import torch", innocent="import json")
    assert loaded_by("import offender", tmp_path) == {"torch"}
    assert loaded_by("import innocent", tmp_path) == set()
