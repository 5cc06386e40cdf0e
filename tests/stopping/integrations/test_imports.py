"""Each integration needs the extra of its own name, and says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dvar

HOUSE = Path(dvar.__file__).parent
HOSTS = sorted(path.stem for path in (HOUSE / "stopping" / "integrations").glob("*.py") if path.stem != "__init__")


def test_every_integration_is_listed() -> None:
    assert HOSTS == ["accelerate", "ignite", "keras", "lightning", "optuna", "ray", "transformers"]


ABSENT = """
import importlib, sys

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {host!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
try:
    importlib.import_module("dvar.stopping.integrations.{host}")
except ImportError as error:
    assert error.__suppress_context__
    print(error)
"""


@pytest.mark.parametrize("host", HOSTS)
def test_without_its_host_an_integration_names_the_extra(host: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HOUSE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", ABSENT.format(host=host)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"dvar.stopping.integrations.{host} needs {host}: pip install 'dvar[{host}]'\n"


def test_each_has_an_extra_and_is_run_here() -> None:
    project = Path(__file__).parents[3] / "pyproject.toml"
    extras = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [host for host in HOSTS if host not in extras] == []
    everything = next(line for line in extras["dev"] if line.startswith("dvar["))
    assert set(HOSTS) <= set(everything.removeprefix("dvar[").removesuffix("]").split(","))
