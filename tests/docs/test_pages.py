"""The pages of the documentation: their links, their commands, their place in the navigation, and the reference."""

from __future__ import annotations

import re
import shlex

import pytest
from docs_build import DOCS, ROOT, load_script
from page_blocks import GENERATED, list_pages, read_blocks

import dvar
from dvar.cli.launch import mark_script
from dvar.cli.main import build_app

PAGES = [DOCS / page for page in list_pages()]


def test_links_between_pages_resolve() -> None:
    generated = tuple(DOCS / name for name in GENERATED)
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES):
        text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)|^\[\w+\]: (\S+)$", text, re.M):
            # A badge of README, whose address the host of the repository knows, stands for a workflow that is there.
            badge = re.fullmatch(r"\.\./\.\./actions/workflows/(\w+\.yml)(/badge\.svg)?", "".join(target))
            path = ROOT / ".github" / "workflows" / badge[1] if badge else (page.parent / "".join(target)).resolve()
            is_generated = any(path == place or place in path.parents for place in generated)
            assert path.exists() or is_generated, f"{page.name}: {''.join(target)}"


def test_every_page_is_in_the_navigation_and_every_page_of_the_navigation_exists() -> None:
    problems = load_script("check_site").navigation_problems(ROOT)
    expected = re.compile(rf"zensical.toml names ({'|'.join(GENERATED)})\S*, which does not exist")
    assert [problem for problem in problems if not expected.match(problem)] == []


def test_every_notebook_and_the_commands_are_in_the_navigation() -> None:
    config = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    names = [f"notebooks/{path.stem}.md" for path in (DOCS / "notebooks").glob("*.py")]
    assert [name for name in (*names, "reference/commands.md") if f'"{name}"' not in config] == []


def test_the_reference_has_every_public_name() -> None:
    described = re.findall(r"^::: (\S+)$", (DOCS / "reference" / "index.md").read_text(encoding="utf-8"), re.M)
    assert sorted(described) == sorted(f"dvar.{name}" for name in dvar.__all__ if name != "__version__")


def list_documented_commands() -> list[str]:
    """Return every `dvar` command in the blocks of shell commands of README.md and of all pages."""
    pages = ["../README.md", *list_pages()]
    blocks = (block for page in pages for block in read_blocks(page) if block.language == "bash")
    return [command for block in blocks for command in block.commands if command.startswith("dvar ")]


@pytest.mark.parametrize("line", list_documented_commands())
def test_every_command_in_the_documentation_parses(line: str) -> None:
    words = mark_script(shlex.split(line, comments=True)[1:])
    build_app(words).parse_args(words, exit_on_error=False, print_error=False)


def test_the_documentation_shows_most_commands() -> None:
    documented = {" ".join(line.split()[1:2]) for line in list_documented_commands()}
    names = {words[0] for words in load_script("commands").list_commands()}
    assert names - documented <= {"demo"}  # which `make demo` runs


def test_the_page_of_commands_has_every_command_and_flag() -> None:
    page = load_script("commands").build_page()
    for words in load_script("commands").list_commands():
        assert f"## dvar {' '.join(words)}\n" in page
    assert page.count("--max_train_steps INT") == 3
    assert "&lt;thing>" in page
