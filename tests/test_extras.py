"""The table of extras against pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from dvar.extras import EXTRAS, install_command

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
IMPORTED_AS = {"pillow": "PIL", "skia_python": "skia", "pytorch_ignite": "ignite"}


def packages_by_extra() -> dict[str, set[str]]:
    """Return the packages of each extra by the names they are imported under, without the contributors' extras."""
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    packages: dict[str, set[str]] = {}
    for extra, requirements in extras.items():
        names = {re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_") for requirement in requirements}
        packages[extra] = {IMPORTED_AS.get(name, name) for name in names}
    del packages["dev"], packages["docs"]
    return packages


def test_the_extra_that_a_message_names_installs_the_package() -> None:
    packages = packages_by_extra()
    assert [package for package, extra in EXTRAS.items() if package not in packages[extra]] == []


def test_every_package_of_every_extra_is_in_the_table() -> None:
    assert set().union(*packages_by_extra().values()) - {"dvar"} == set(EXTRAS)


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("scipy.stats", "pip install 'dvar[lab]'"),
        ("PIL", "pip install 'dvar[train]'"),
        ("starlette", "pip install 'dvar[survey]'"),
        ("wandb", "pip install wandb"),
    ],
)
def test_a_missing_module_names_what_to_install(module: str, command: str) -> None:
    assert install_command(module) == command
