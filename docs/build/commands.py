"""The page docs/reference/commands.md, from the help of the commands: ``python docs/build/commands.py`` writes it."""

# The page follows the flags, so git does not hold it: `make docs` writes it before it builds the site.

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from cyclopts import App

from dvar.cli.main import build_app
from dvar.config.methods import PAPER_METHODS

PAGE = Path(__file__).parents[1] / "reference" / "commands.md"
OPENING = """# Commands

What `dvar COMMAND --help` says. Flags may be written with hyphens; `--no_NAME` turns a switch off; flags that are
required are marked. A settings file (`--config FILE.toml`) holds any flags of `dvar train` by name.
"""


def build_page() -> str:
    """Return the whole page, one section for each command."""
    return "\n\n".join(text.strip() for text in (OPENING, *(_describe(words) for words in list_commands()))) + "\n"


def list_commands() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command that does something; methods of other packages are not ours to describe."""
    for method in PAPER_METHODS:
        yield "train", method
    app = build_app([])
    for name in _names(app):
        inner = _names(app[name])
        yield from ((name, each) for each in inner) if inner else ((name,),) if name != "train" else ()


def _names(app: App) -> list[str]:
    return [name for name in app if not name.startswith("-")]


def _describe(words: Sequence[str]) -> str:
    """Return the section of a command; flags of a training method have the values of the preset for real models."""
    app = build_app([*words, "--preset", "lean", "--help"] if words[0] == "train" else [*words, "--help"])
    for word in words:
        app = app[word]
    text = app.generate_docs(output_format="markdown", heading_level=2, usage_name=f"dvar {' '.join(words)}")
    text = text.replace("```console", "```text").replace("<", "&lt;")
    return re.sub(r"^## .*$", f"## dvar {' '.join(words)}", text, count=1, flags=re.M)


if __name__ == "__main__":
    PAGE.write_text(build_page(), encoding="utf-8", newline="\n")
    print(PAGE)
