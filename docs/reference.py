"""The page docs/reference.md, from the docstrings: ``python docs/reference.py`` writes it."""

# The page holds the public names, `dvar.*`, and the other public names of the stopping modules.

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import dvar
from dvar.logs import reader
from dvar.stopping import combinators, curve, diagnosis, probe, rules, trace, verdict

PAGE = Path(__file__).with_suffix(".md")
LONG, MANY = 88, 20  # characters of a line; settings that `dvar train --help` lists better
MODULES = (rules, combinators, curve, diagnosis, verdict, trace, probe, reader)
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
OPENING = """# Reference

<!-- written by docs/reference.py -->

`dvar.*` are the public names; everything else of the stopper is imported from its module. The stopper needs NumPy only,
except for its probes. `Source` names the place in the paper, `Deviates` what we do differently.
"""


def page() -> str:
    """Return the whole page."""
    public = {name: getattr(dvar, name) for name in dvar.__all__ if name != "__version__"}
    parts = [OPENING, "## dvar", format_docstring(dvar)]
    parts += [format_entry(f"dvar.{name}", item) for name, item in public.items()]
    for module in MODULES:
        own = {name: item for name, item in find_own_items(module) if item not in public.values()}
        parts += [f"## {module.__name__}", format_docstring(module)]
        parts += [format_entry(f"{module.__name__}.{name}", item) for name, item in own.items()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def find_own_items(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Yield the public classes and functions that a module defines itself."""
    for name, item in vars(module).items():
        defined = (inspect.isclass(item) or inspect.isfunction(item)) and item.__module__ == module.__name__
        if defined and not name.startswith("_"):
            yield name, item


def format_entry(name: str, item: Any) -> str:
    """Return the section of a class or function: its signature, its docstring, and its members."""
    heading, text = f"### {name}", format_docstring(item)
    if inspect.isclass(item) and issubclass(item, BaseException | str):
        return f"{heading}\n\n{text}"
    parts = [heading, f"```python\n{name.rpartition('.')[2]}{format_signature(item)}\n```", text]
    if inspect.isclass(item):
        parts += [_format_member(item, name, member) for name, member in vars(item).items() if _is_member(name, member)]
    return "\n\n".join(part for part in parts if part)


def format_signature(item: Callable[..., Any]) -> str:
    """Return a signature, one setting a line where it is long; of very many settings, where to find them."""
    signature = _read_signature(item)
    if len(str(signature)) <= LONG:
        return str(signature)
    if len(signature.parameters) > MANY:
        return "(\n    ...,  # one keyword for each flag of the command\n)"
    lines = "".join(f"    {parameter},\n" for parameter in signature.parameters.values())
    rest = signature.replace(parameters=())
    return f"(\n{lines}{str(rest)[1:]}"


def format_docstring(item: object) -> str:
    """Return a docstring as Markdown: its sections as lists, everything else as it is."""
    lines: list[str] = []
    section = ""
    for line in (inspect.getdoc(item) or "").splitlines():
        if line.removesuffix(":") in SECTIONS:
            section = line.removesuffix(":")
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            lines.append(_format_section_line(section, line[4:]))
        else:
            section = section if not line else ""
            lines.append(re.sub(r"^(Raises|Source|Deviates): ", r"\n- **\1:** ", line))
    return "\n".join(lines)


def _format_section_line(section: str, line: str) -> str:
    """Return a line of a section: an item of its list, or the continuation of one."""
    name, colon, description = line.partition(": ")
    if section in ("Returns", "Yields"):
        return line
    return f"- `{name}`: {description}" if colon and re.fullmatch(r"\*{0,2}[\w., *]+", name) else f"  {line.strip()}"


def _is_member(name: str, member: object) -> bool:
    documented = isinstance(member, property | classmethod) or inspect.isfunction(member)
    return documented and not name.startswith("_") and bool(inspect.getdoc(member))


def _format_member(owner: type, name: str, member: object) -> str:
    signature = "" if isinstance(member, property) else str(_read_signature(getattr(owner, name)))
    lines = f"- `.{name}{signature}`: {format_docstring(member)}".splitlines()
    return "\n".join(lines[:1] + [f"  {line}".rstrip() for line in lines[1:]])


class _SourceText(str):
    """An annotation as it is in the source, without quotes."""

    __repr__ = str.__str__


def _read_signature(item: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of ``item`` without ``self``, its annotations as they are in the source."""
    signature = inspect.signature(item)
    parameters = [
        parameter.replace(annotation=_unquote(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return signature.replace(parameters=parameters, return_annotation=_unquote(signature.return_annotation))


def _unquote(annotation: object) -> object:
    return _SourceText(annotation) if isinstance(annotation, str) else annotation


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(PAGE)
