"""Lower bounds of dependencies: each has one, and none admits a version with a hole that was known when it was set."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MENDED = {
    "h11": (0, 16),  # CVE-2025-43859: a chunked body that a proxy reads otherwise
    "jinja2": (3, 1, 6),  # CVE-2025-27516
    "keras": (3, 12),  # CVE-2025-12058 and CVE-2025-12060
    "pillow": (12, 1, 1),  # CVE-2026-25990: PSD files that write out of bounds
    "starlette": (0, 49, 1),  # CVE-2025-62727: ranges that take quadratic time
    "torch": (2, 8),  # CVE-2025-3730
}


@pytest.fixture(scope="module")
def lowest() -> dict[str, tuple[int, ...]]:
    script = ROOT / "packaging" / "lowest_versions.py"
    process = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    pairs = (line.split("==") for line in process.stdout.splitlines())
    return {name: tuple(int(part) for part in version.split(".")) for name, version in pairs}


@pytest.mark.parametrize("name", MENDED)
def test_no_version_with_a_known_hole_is_admitted(lowest: dict[str, tuple[int, ...]], name: str) -> None:
    assert lowest[name] >= MENDED[name]


def test_the_versions_known_to_work_are_admitted(lowest: dict[str, tuple[int, ...]]) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.lower().split("==") for line in lines if "==" in line)
    names = sorted(name for name in lowest if name in pinned)
    assert len(names) > 15
    for name in names:
        numbers = tuple(int(part) for part in pinned[name].split("+")[0].split(".") if part.isdecimal())
        assert numbers >= lowest[name], name


def test_the_locked_files_are_of_the_versions_known_to_work() -> None:
    pinned, locked = (_read_pins(name) for name in ("constraints.txt", "locked.txt"))
    assert locked == pinned, "make locked"
    entries = (ROOT / "locked.txt").read_text(encoding="utf-8").split("\n    ")
    assert sum(entry.startswith("--hash=sha256:") for entry in entries) >= 2 * len(pinned)


def test_the_versions_known_to_work_suit_each_other() -> None:
    """What the installed packages require of each other, which pip would refuse otherwise."""
    pinned = _read_pins("constraints.txt")
    checked = 0
    for name in pinned:
        for requirement in _read_requirements(name):
            version = pinned.get(canonicalize_name(requirement.name))
            if version and (requirement.marker is None or requirement.marker.evaluate()):
                assert requirement.specifier.contains(version, prereleases=True), f"{name} requires {requirement}"
                checked += 1
    assert checked > 100


def _read_pins(name: str) -> dict[str, str]:
    """Return the version of each package in a file of pins."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = (line.split(";")[0].rstrip(" \\").split("==") for line in lines if "==" in line)
    return {canonicalize_name(package): version.strip() for package, version in pins}


def _read_requirements(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in requires(name) or ()]
    except PackageNotFoundError:  # of another platform
        return []
