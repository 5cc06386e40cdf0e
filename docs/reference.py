"""The page docs/reference.md, from the docstrings: ``python docs/reference.py`` writes it anew.

It holds the public face, `dvar.*`, and what else the rooms of the stopper offer by name.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import dvar

PAGE = Path(__file__).with_suffix(".md")
LONG, MANY = 88, 20  # characters of a line; settings that `dvar train --help` lists better
ROOMS = ("rules", "combinators", "curve", "diagnosis", "verdict", "trace", "probe", "logs.reader")
OPENING = """# Reference

<!-- written by docs/reference.py -->

`dvar.*` is the public face; whatever of the stopper is not there is imported from its room. The stopper needs NumPy
alone, but for its probes. `Source` names the place in the paper, `Deviates` where we differ from it.
"""


def page() -> str:
    """The whole page."""
    face = {name: getattr(dvar, name) for name in dvar.__all__ if name != "__version__"}
    parts = [OPENING, "## dvar", _text(dvar), *(_entry(f"dvar.{name}", found) for name, found in face.items())]
    for name in ROOMS:
        room = importlib.import_module(f"dvar.stopping.{name}")
        found = {own: value for own, value in _own(room) if value not in face.values()}
        parts += [f"## {room.__name__}", _text(room)]
        parts += [_entry(f"{room.__name__}.{own}", value) for own, value in found.items()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _own(room: ModuleType) -> Iterator[tuple[str, type]]:
    """The classes and functions that a room itself defines and offers."""
    for name, value in vars(room).items():
        defined = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == room.__name__
        if defined and not name.startswith("_"):
            yield name, value


def _entry(name: str, found: type) -> str:
    title, text = f"### {name}", _text(found)
    if inspect.isclass(found) and issubclass(found, BaseException | str):
        return f"{title}\n\n{text}"
    parts = [title, f"```python\n{name.rpartition('.')[2]}{_call(found)}\n```", text]
    if inspect.isclass(found):
        parts += [_member(found, own, value) for own, value in vars(found).items() if _is_member(own, value)]
    return "\n\n".join(part for part in parts if part)


def _is_member(name: str, value: object) -> bool:
    called = isinstance(value, property | classmethod) or inspect.isfunction(value)
    return called and not name.startswith("_") and bool(inspect.getdoc(value))


def _member(owner: type, name: str, value: object) -> str:
    signature = "" if isinstance(value, property) else str(_signature(getattr(owner, name)))
    return f"- `.{name}{signature}`: {inspect.cleandoc(str(inspect.getdoc(value)))}".replace("\n", "\n  ")


class _Written(str):
    """An annotation as it stands in the source, without the quotes of a string."""

    __repr__ = str.__str__


def _signature(found: object) -> inspect.Signature:
    signature = inspect.signature(found)  # type: ignore[arg-type]
    kept = [
        parameter.replace(annotation=_written(parameter.annotation))
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    return signature.replace(parameters=kept, return_annotation=_written(signature.return_annotation))


def _written(annotation: object) -> object:
    return _Written(annotation) if isinstance(annotation, str) else annotation


def _call(found: type) -> str:
    """The signature, a setting a line where it is long; of very many settings, where to find them."""
    signature = _signature(found)
    if len(str(signature)) <= LONG:
        return str(signature)
    if len(signature.parameters) > MANY:
        return "(\n    ...,  # one keyword for each flag of the command\n)"
    lines = "".join(f"    {parameter},\n" for parameter in signature.parameters.values())
    plain = signature.replace(parameters=())
    return f"(\n{lines}{str(plain)[1:]}"


def _text(found: object) -> str:
    """The docstring as Markdown: its closing lines as a list, everything else as it stands."""
    text = inspect.getdoc(found) or ""
    return re.sub(r"(?m)^(Raises|Source|Deviates): ", r"\n- **\1:** ", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
    print(PAGE)
