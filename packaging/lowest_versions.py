"""Print the lowest versions that pyproject.toml admits, each as NAME==VERSION, so that they can be audited."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXCEPT = {"dvar", "dvar-mini"}  # ourselves


def lowest_versions(project: dict[str, object]) -> list[str]:
    """Return NAME==VERSION for each requirement of a project, of one that is there twice the lower version.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    own: list[str] = project["dependencies"]  # type: ignore[assignment]
    versions: dict[str, str] = {}
    for requirement in [*own, *(item for name, items in extras.items() if name != "dev" for item in items)]:
        name = re.split(r"[\[<>=;, ]", requirement)[0].lower()
        bound = re.search(r">=([0-9.]+)", requirement)
        if name in EXCEPT:
            continue
        if not bound:
            raise ValueError(f"{requirement} has no lower bound: add the oldest version that works")
        old = versions.get(name, bound[1])
        versions[name] = min(old, bound[1], key=lambda version: [int(part) for part in version.split(".")])
    return [f"{name}=={version}" for name, version in sorted(versions.items())]


if __name__ == "__main__":
    print("\n".join(lowest_versions(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])))
