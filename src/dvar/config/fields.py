"""What a setting is: a field with its help, the values it admits and another name for it.  Pure.

A class of settings is a frozen dataclass of such fields; what is done with all of them alike is done here.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from dvar.errors import RefusedInput, nearest


@dataclass(frozen=True)
class Range:
    """The numbers from ``low`` (itself out when ``above``) up to but not including ``high``; never infinity or NaN."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high and not (self.above and value == self.low)

    def __str__(self) -> str:
        start = f"{'above' if self.above else 'at least'} {self.low:g}"
        return start if math.isinf(self.high) else f"{start} and below {self.high:g}"


COUNT = Range(1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)


def setting(default: Any, help: str, allowed: Range | None = None, *, section: str = "", alias: str = "") -> Any:
    """A dataclass field that carries its help, the numbers it admits and another name for it.

    ``section`` opens a part of the help page, or goes on with one that a field before it opened.
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, "section": section, "alias": alias})


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a command is set by: each field was made by `setting`."""


C = TypeVar("C", bound=Config)


def faults(config: Config) -> Iterator[tuple[str, str]]:
    """(setting, what is wrong) for each value of a wrong type or out of its range."""
    annotations = get_type_hints(type(config))
    for item in fields(config):
        value, annotation, allowed = getattr(config, item.name), annotations[item.name], item.metadata["allowed"]
        if not _admits(annotation, value):
            yield item.name, f"{item.name} must be {_wording(annotation)}, got {value!r}"
        elif value is not None and allowed and value not in allowed:
            yield item.name, f"{item.name} must be {allowed}, got {value!r}"


def sound(config: C) -> C:
    """The same settings with each ill-formed one at its default, for checks that go on after a fault was found."""
    wrong = dict(faults(config))
    defaults: dict[str, Any] = {item.name: item.default for item in fields(config) if item.name in wrong}
    return replace(config, **defaults)


def aliases(known: type[Config]) -> dict[str, str]:
    """Other name to the name of the setting it stands for."""
    return {item.metadata["alias"]: item.name for item in fields(known) if item.metadata["alias"]}


def canonical(settings: Mapping[str, Any], known: type[Config]) -> dict[str, Any]:
    """The same settings under their own names: hyphens become underscores, and an alias the name it stands for.

    Raises: `RefusedInput` naming each unknown setting with the nearest known one, and each setting given twice.
    """
    names, others = [item.name for item in fields(known)], aliases(known)
    found: dict[str, Any] = {}
    problems = []
    for given, value in settings.items():
        plain = given.replace("-", "_")
        name = others.get(plain, plain)
        if name not in names:
            problems.append(f"unknown setting {given!r}: the nearest known one is {nearest(plain, [*names, *others])}")
        elif name in found:
            problems.append(f"{name} is given twice, the second time as {given!r}: keep one of them")
        found[name] = value
    if problems:
        raise RefusedInput(problems)
    return found


def read_settings(path: str | Path, known: type[Config]) -> dict[str, Any]:
    """The settings written in a TOML file, one ``name = value`` a line, under their own names.

    Raises: `RefusedInput` when the file is missing, is no TOML, or holds unknown settings (all are named).
    """
    try:
        read = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise RefusedInput([f"settings file {path}: {error.strerror or error}; check --config"]) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RefusedInput([f"settings file {path} is not valid TOML: {error}"]) from error
    try:
        return canonical(read, known)
    except RefusedInput as error:
        raise RefusedInput([f"settings file {path}: {problem}" for problem in error.problems]) from error


def _admits(annotation: Any, value: object) -> bool:
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        part, _ = get_args(annotation)
        return isinstance(value, tuple) and bool(value) and all(_admits(part, each) for each in value)
    if isinstance(annotation, UnionType):
        return any(_admits(part, value) for part in get_args(annotation))
    if annotation in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if annotation is float else annotation)


def _wording(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return _wording(get_args(annotation)[0])
    if isinstance(annotation, UnionType):
        return " or ".join(_wording(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
