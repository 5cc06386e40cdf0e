"""The architecture, read from the source: which package may import which, what stays light, what is never loaded."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dvar

PACKAGE = Path(dvar.__file__).parent

# Imports point to a package of a lower layer, or stay within the package. `dvar` itself is on top.
LAYERS = {
    "_version": 0,
    "errors": 0,
    "extras": 0,
    "locks": 1,
    "schema": 1,
    "files": 2,
    "registry": 2,
    "html": 3,
    "cluster": 3,
    "mini": 2,
    "stopping": 3,
    "logs": 4,
    "config": 4,
    "diffusion": 5,
    "launch": 5,
    "training": 6,
    "runs": 7,
    "recordings": 8,
    "analysis": 9,
    "jobs": 9,
    "survey": 10,
    "studio": 11,
    "paper": 11,
    "testing": 12,
    "cli": 13,
    "__main__": 14,
    "__init__": 14,
}
PURE = (
    "errors",
    "files",
    "locks",
    "registry",
    "schema",
    "cluster.task",
    "config.buckets",
    "config.fields",
    "config.templates",
    "config.methods",
    "config.objective",
    "config.training",
    "launch.config",
    "launch.instrument",
    "launch.loops",
    "launch.script",
    "jobs.config",
    "paper.config",
    "recordings.config",
    "recordings.protocol",
    "runs.config",
    "survey.config",
    "studio.config",
    "studio.run_files",
    "stopping.cadence",
    "stopping.combinators",
    "stopping.octave",
    "stopping.curve",
    "stopping.diagnosis",
    "stopping.gloo_exit",
    "stopping.monitor",
    "stopping.prediction",
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
    "gradio",
)
IMPORTERS = ("import_module", "__import__", "import_string", "resolve_name")
READERS = (
    "files",
    *(
        "html.templates",
        "mini.__init__",
        "mini.recogniser",
        "diffusion.clip",
        "studio.app",
    ),  # of the package's own files
    *("testing.contracts", "testing.family_contract", "testing.method_contract"),  # of what they have written
    *("cluster.local", "survey.build", "training.checkpoint"),  # of what they have written
    "stopping.gloo_exit",  # of the kernel's own
    *("jobs.job", "stopping.integrations.trainers.tools", "training.dataset"),  # of what they have looked at
)
"""The modules that may read a whole file by themselves."""
OPENERS = ("Image.open", "load_file", "safe_open", "np.load")
"""What opens a file in other libraries: the path it gets has passed `dvar.files.regular_file`."""
TORCH_PICKLERS = ("load", "save", "hub")
PICKLERS = ("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")


# --- reading the source ---------------------------------------------------------------------------------------------


def parse_modules(root: Path) -> dict[str, ast.Module]:
    """Return the parsed modules by their name inside the package: "stopping.trace", "stopping.__init__", "__init__"."""
    files = sorted(root.rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts): ast.parse(path.read_bytes()) for path in files}


def list_imports(name: str, tree: ast.AST, module_names: frozenset[str]) -> Iterator[str]:
    """Yield every import in the module, at any depth: "numpy.typing", or "dvar.stopping.trace" for our own."""
    package = ["dvar", *name.split(".")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
            source = source if node.level else str(node.module)
            for alias in node.names:
                full_name = f"{source}.{alias.name}"
                is_module = (
                    full_name.removeprefix("dvar.") in module_names
                    or f"{full_name.removeprefix('dvar.')}.__init__" in module_names
                )
                yield full_name if is_module or source == "dvar" else source


def package_of(name: str) -> str:
    return name.split(".")[0]


def own_name(target: str) -> str | None:
    """Return the name inside the package of what is imported, None for other packages; `dvar` itself is "__init__"."""
    if target != "dvar" and not target.startswith("dvar."):
        return None
    return target.removeprefix("dvar").removeprefix(".") or "__init__"


def list_all_imports(root: Path) -> Iterator[tuple[str, str]]:
    trees = parse_modules(root)
    for name, tree in trees.items():
        yield from ((name, target) for target in list_imports(name, tree, frozenset(trees)))


def find_upward_imports(root: Path) -> list[str]:
    """Return the imports that point to a higher layer; anything may read the version."""
    problems = []
    for name, target in list_all_imports(root):
        inside = own_name(target)
        if inside is None or inside == "__version__" or package_of(inside) == package_of(name):
            continue
        if LAYERS.get(package_of(inside), LAYERS["__init__"]) >= LAYERS[package_of(name)]:
            problems.append(f"{name} imports {target}")
    return problems


def find_impure_imports(root: Path) -> list[str]:
    """Return the imports of pure modules that are not of the standard library, numpy or another pure module."""
    allowed = {*sys.stdlib_module_names, "numpy", "tomli"}  # Python 3.10 has no tomllib
    return [
        f"{name} imports {target}"
        for name, target in list_all_imports(root)
        if name in PURE and package_of(target) not in allowed and own_name(target) not in PURE
    ]


def find_importing_packages(root: Path) -> list[str]:
    """Return each `__init__` with more than a docstring: importing one module of the package would load others."""
    return [
        name
        for name, tree in parse_modules(root).items()
        if name.endswith(".__init__")
        and package_of(name) not in ("mini", "testing")  # interfaces of their own for code outside
        and not (len(tree.body) <= 1 and all(isinstance(node, ast.Expr) for node in tree.body))
    ]


def find_unpickling(root: Path) -> list[str]:
    """Return the places that could run code from a file."""
    problems = [f"{name} imports {target}" for name, target in list_all_imports(root) if package_of(target) in PICKLERS]
    for name, tree in parse_modules(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                problems += [
                    f"{name} imports torch.{alias.name}" for alias in node.names if alias.name in TORCH_PICKLERS
                ]
            elif isinstance(node, ast.Attribute) and ast.unparse(node) in {f"torch.{word}" for word in TORCH_PICKLERS}:
                problems.append(f"{name} uses {ast.unparse(node)}")
            elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
                problems.append(f"{name} allows pickle")
    return problems


def find_string_imports(root: Path) -> list[str]:
    """Return the places that import what a string names."""
    problems = []
    for name, tree in parse_modules(root).items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node).split(".")[-1] in IMPORTERS:
                problems.append(f"{name} uses {ast.unparse(node)}")
            elif isinstance(node, ast.alias) and node.name.split(".")[-1] in IMPORTERS:
                problems.append(f"{name} imports {node.name}")
    return problems


def find_unbounded_reads(root: Path) -> list[str]:
    """Return the places that read or open a whole file which nobody has looked at: it may never end."""
    return [
        f"{name} calls {ast.unparse(node.func)}"
        for name, tree in parse_modules(root).items()
        if name not in READERS
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _reads_unbounded(node)
    ]


def _reads_unbounded(call: ast.Call) -> bool:
    reader = ast.unparse(call.func)
    if reader in OPENERS:
        return not ast.unparse(call.args[0]).startswith("regular_file(")
    return isinstance(call.func, ast.Attribute) and call.func.attr in ("read_bytes", "read_text")


def find_circles(root: Path) -> list[set[str]]:
    """Return the groups of modules of which each imports the others, directly or through one another."""
    targets: dict[str, set[str]] = {}
    for name, target in list_all_imports(root):
        targets.setdefault(name, set()).add(own_name(target) or "")

    def find_reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = set(targets.get(start, ()))
        while waiting:
            name = waiting.pop()
            seen.add(name)
            waiting |= targets.get(name, set()) - seen
        return seen

    reaches = {name: find_reachable(name) for name in targets}
    groups = [{other for other in targets if other in reaches[name] and name in reaches[other]} for name in targets]
    return [group for index, group in enumerate(groups) if len(group) > 1 and group not in groups[:index]]


def measure_shares(root: Path) -> dict[str, float]:
    """Return the share of all lines that each package has."""
    lines: dict[str, int] = {}
    for path in root.rglob("*.py"):
        package = path.relative_to(root).parts[0]
        lines[package] = lines.get(package, 0) + path.read_text(encoding="utf-8").count("\n")
    return {package: count / sum(lines.values()) for package, count in lines.items()}


def find_heavy_imports(statement: str, *paths: Path) -> set[str]:
    """Return the heavy packages that a fresh interpreter has loaded after `statement`."""
    program = f"import sys\n{statement}\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    path = os.pathsep.join(str(part) for part in (*paths, PACKAGE.parent))
    environment = {**os.environ, "PYTHONPATH": path}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return set(process.stdout.split())


# --- dvar itself --------------------------------------------------------------------------------------------------


def test_imports_point_one_way() -> None:
    assert find_upward_imports(PACKAGE) == []


def test_every_package_has_its_layer() -> None:
    assert {package_of(name) for name in parse_modules(PACKAGE)} <= set(LAYERS)


def test_pure_modules_import_only_the_standard_library_and_numpy() -> None:
    assert find_impure_imports(PACKAGE) == []
    assert set(PURE) <= set(parse_modules(PACKAGE))


def test_importing_a_package_loads_none_of_its_modules() -> None:
    assert find_importing_packages(PACKAGE) == []


def test_nothing_unpickles() -> None:
    assert find_unpickling(PACKAGE) == []


def test_nothing_is_resolved_by_importing_a_string() -> None:
    assert find_string_imports(PACKAGE) == []


def test_no_file_of_a_user_is_read_without_a_bound() -> None:
    assert find_unbounded_reads(PACKAGE) == []


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert find_circles(PACKAGE) == []


def test_no_package_outgrows_the_others() -> None:
    assert {package: share for package, share in measure_shares(PACKAGE).items() if share > 0.15} == {}


def test_importing_dvar_loads_nothing_heavy() -> None:
    assert find_heavy_imports("import dvar; dvar.Dvar(310, 0.15)(dvar.Trace())") == set()


def test_the_public_names_are_exactly_all() -> None:
    tree = parse_modules(PACKAGE)["__init__"]
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
def test_every_public_name_exists(name: str) -> None:
    assert getattr(dvar, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dvar.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_name_whose_package_is_missing_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['torch'] = None; import dvar"
    program = f"{hidden}\ntry: dvar.Probe\nexcept ImportError as error: print(error)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == "dvar.Probe needs torch: pip install 'dvar[train]'"


# --- planted offenders: each check must be able to fail -------------------------------------------------------------


def write_modules(tmp_path: Path, **files: str) -> Path:
    """Write modules into a package, and return its folder; "stopping__trace" stands for stopping/trace.py."""
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
        "import dvar.new_package",
    ],
)
def test_an_import_that_points_up_is_found(tmp_path: Path, offence: str) -> None:
    root = write_modules(tmp_path, diffusion__objective=offence, training__loop="import torch")
    (root / "training" / "__init__.py").write_text("")
    assert len(find_upward_imports(root)) == 1
    assert find_upward_imports(root)[0].startswith("diffusion.objective imports dvar")


def test_imports_that_point_down_or_stay_in_the_package_are_not_offences(tmp_path: Path) -> None:
    down = "import numpy\nfrom dvar.errors import DvarError\nfrom . import verdict, trace"
    root = write_modules(tmp_path, stopping__rules=down, stopping__trace="", stopping__verdict="", errors="")
    write_modules(tmp_path, training__run="from dvar import __version__", cli="from dvar.runs import report")
    assert find_upward_imports(root) == [] == find_impure_imports(root)


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
def test_an_impure_import_in_a_pure_module_is_found(tmp_path: Path, offence: str) -> None:
    root = write_modules(tmp_path, stopping__verdict=offence, stopping__probe="import torch")
    assert len(find_impure_imports(root)) == 1
    assert find_impure_imports(root)[0].startswith("stopping.verdict imports ")


def test_a_package_that_loads_a_module_is_found(tmp_path: Path) -> None:
    root = write_modules(tmp_path, stopping__rules="")
    init = root / "stopping" / "__init__.py"
    init.write_text('"""Stopping rules."""\n')
    assert find_importing_packages(root) == []
    init.write_text('"""Stopping rules."""\nfrom dvar.stopping.rules import Dvar\n')
    assert find_importing_packages(root) == ["stopping.__init__"]


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
    assert len(find_unpickling(write_modules(tmp_path, training__checkpoint=offence))) == 1
    assert (
        find_unpickling(
            write_modules(tmp_path, training__checkpoint="import numpy\nnumpy.load('x', allow_pickle=False)")
        )
        == []
    )


@pytest.mark.parametrize(
    "offence",
    [
        "from importlib import import_module",
        "import importlib\nimportlib.import_module('dvar.stopping.rules')",
        "module = __import__('dvar')",
        "from pkgutil import resolve_name",
    ],
)
def test_importing_a_string_is_found(tmp_path: Path, offence: str) -> None:
    assert len(find_string_imports(write_modules(tmp_path, paper__reproduce=offence))) == 1
    assert find_string_imports(write_modules(tmp_path, paper__reproduce="import importlib.resources")) == []


def test_an_unbounded_read_is_found(tmp_path: Path) -> None:
    root = write_modules(
        tmp_path,
        launch__script="def read(path): return path.read_bytes()",
        files="def read(path): return path.read_bytes()",
        jobs__read="from dvar.files import read_text\nread_text(path)",
        runs__images="Image.open(regular_file(path))",
        runs__weights="load_file(path)",
    )
    assert find_unbounded_reads(root) == ["launch.script calls path.read_bytes", "runs.weights calls load_file"]


def test_a_circle_is_found(tmp_path: Path) -> None:
    root = write_modules(tmp_path, training__run="import dvar.training.loop", training__loop="", errors="")
    assert find_circles(root) == []
    write_modules(
        tmp_path,
        training__loop="from dvar.training.dataset import read",
        training__dataset="def later():\n import dvar.training.run",
    )
    assert find_circles(root) == [{"training.run", "training.loop", "training.dataset"}]


def test_a_package_that_outgrows_the_others_is_found(tmp_path: Path) -> None:
    root = write_modules(tmp_path, paper__page="x = 1\n" * 20, errors="x = 1\n" * 80)
    assert measure_shares(root) == {"paper": 0.2, "errors.py": 0.8}


def test_a_heavy_import_is_found(tmp_path: Path) -> None:
    write_modules(tmp_path, torch="", offender="import torch", innocent="import json")
    assert find_heavy_imports("import offender", tmp_path) == {"torch"}
    assert find_heavy_imports("import innocent", tmp_path) == set()
