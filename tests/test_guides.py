"""The guides for contributors: every name and path they mention exists, and their prose wraps at 120 columns."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = (
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CODE_OF_CONDUCT.md",
    "docs/contributing/architecture.md",
    "docs/concepts/glossary.md",
)
WRAPPED = sorted({*GUIDES, "LOG.md", "README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))})
# These are generated, a paragraph a line; those that the site's build writes are there after it.
WRAPPED = [page for page in WRAPPED if page not in ("docs/results.md", "docs/reference/commands.md")]
WRAPPED = [page for page in WRAPPED if not page.startswith("docs/notebooks/")]
PACKAGE = ROOT / "src" / "dvar"


def is_resolvable(name: str) -> bool:
    """Return whether a dotted name, such as dvar.stopping.rules.RULES, is a module or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            thing = import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


def find_long_lines(text: str) -> list[str]:
    """Return the lines of prose above 120 columns; tables, code, images and lines of one word may be longer."""
    prose = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [
        line
        for line in prose.splitlines()
        if len(line) > 120 and not line.lstrip().startswith(("|", "![", "<", "[")) and " " in line.strip()[:118]
    ]


@pytest.mark.parametrize("guide", GUIDES)
def test_every_name_in_a_guide_exists(guide: str) -> None:
    names = set(re.findall(r"`(dvar(?:\.\w+)+)", (ROOT / guide).read_text(encoding="utf-8")))
    names -= {f"dvar.{group}" for group in ("rules", "methods", "backbones", "log_formats", "tools", "experiments")}
    assert [name for name in sorted(names) if not is_resolvable(name)] == []


@pytest.mark.parametrize("guide", GUIDES)
def test_every_path_in_a_guide_exists(guide: str) -> None:
    text = (ROOT / guide).read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", text)) | set(re.findall(r"\]\(((?!http)[^)#]+)", text))
    places = (ROOT, PACKAGE, (ROOT / guide).parent)
    assert [path for path in sorted(paths) if not any((place / path).exists() for place in places)] == []


@pytest.mark.parametrize("page", WRAPPED)
def test_prose_wraps_at_120_columns(page: str) -> None:
    assert find_long_lines((ROOT / page).read_text(encoding="utf-8")) == []


def test_a_wrong_name_and_a_long_line_are_detected() -> None:
    assert is_resolvable("dvar.stopping.rules.Dvar")
    assert not is_resolvable("dvar.stopping.rules.Nonsense")
    assert not is_resolvable("dvar.nonsense.Dvar")
    assert find_long_lines("word " * 30) == ["word " * 30]
    assert find_long_lines("| " + "cell " * 30) == []
