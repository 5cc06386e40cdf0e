"""The look of help pages."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from cyclopts.help.specs import ColumnSpec
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

FRAME, GAP = 4, 2
"""Columns that a panel's frame takes, and the columns between two columns of its table."""


def print_panel(console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
    """Print one section of flags; a switch that is off does not show the flag that turns it off."""
    from cyclopts.help import DefaultFormatter

    entries = [entry if entry.default else entry.copy(negative_names=()) for entry in panel.entries]
    DefaultFormatter(column_specs=_columns)(console, options, panel.copy(entries=entries))


def format_terms(terms: Mapping[str, str]) -> str:
    """Return lines of terms and their meanings in two columns, wrapped to the width of the terminal."""
    import textwrap

    indent = max(map(len, terms)) + 2
    width = shutil.get_terminal_size().columns
    lines = (
        textwrap.fill(f"{term:<{indent}}{meaning}", width, subsequent_indent=" " * indent)
        for term, meaning in terms.items()
    )
    return "\n".join(lines)


def _columns(console: Console, options: ConsoleOptions, entries: Sequence[HelpEntry]) -> tuple[ColumnSpec, ...]:
    """Return the columns of flags and their help; no flag is broken inside its name."""
    from cyclopts.help import NameRenderer
    from cyclopts.help.specs import AsteriskColumn, ColumnSpec

    # What cyclopts 5 adds: with cyclopts 4, the last one for Python 3.10, a flag is as long as its names.
    longest = max(
        len(word)
        for entry in entries
        for word in getattr(entry, "display_labels_with_metavar", (*entry.names, *entry.shorts))
    )
    width = max(math.ceil(console.width * 0.35), longest)
    names = NameRenderer(max_width=width)
    marker = [AsteriskColumn] if any(entry.required for entry in entries) else []
    used = max(len(line) for entry in entries for line in str(names(entry)).splitlines())
    rest = console.width - FRAME - used - GAP - len(marker) * (1 + GAP)
    return (
        *marker,
        ColumnSpec(renderer=names, style="cyclopts.name", max_width=width),
        ColumnSpec(renderer=lambda entry: _describe(entry, console, rest), overflow="fold"),
    )


def _describe(entry: HelpEntry, console: Console, width: int) -> Text:
    """Return the help of a flag; choices and default begin a new line unless they fit in the last one."""
    from rich.text import Text

    text = Text(str(getattr(entry.description, "primary_renderable", "")))
    notes = [
        ("choices", f"[choices: {', '.join(entry.choices or ())}]" if entry.choices else ""),
        ("default", f"[default: {entry.default}]" if entry.default else ""),
        ("required", "[required]" if entry.required else ""),
    ]
    for style, note in notes:
        if note:
            used = text.wrap(console, width)[-1].cell_len
            text.append(" " if used + 1 + len(note) <= width else "\n")
            text.append(note, f"cyclopts.{style}")
    return text
