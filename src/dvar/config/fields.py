"""Fields of config classes: their help, the values they admit and their aliases."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeGuard, TypeVar, Union, get_args, get_origin, get_type_hints

from dvar.errors import RefusedInput, nearest
from dvar.files import read_text
from dvar.schema import is_encodable

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Range:
    """The finite numbers from ``low`` up to but not including ``high``; with ``above``, ``low`` is excluded too.

    With ``most``, the numbers up to and including it.
    """

    low: float
    high: float = math.inf
    above: bool = False
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.low <= value < self.high and value <= self.most and not (self.above and value == self.low)

    def requirement(self, value: float) -> str:
        """Return what ``value``, which is not in this range, must be."""
        if value > self.most:
            return f"at most {self.most}"
        start = f"{'above' if self.above else 'at least'} {self.low:g}"
        if isinstance(value, float) and not math.isfinite(value):
            start += " and finite"
        return start if math.isinf(self.high) else f"{start} and below {self.high:g}"


COUNT = Range(1, most=2**31 - 1)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
BATCH = Range(1, most=65_536)
"""Samples in one forward pass: more are a slip of the keyboard, and would fill any memory before they are refused."""
IMAGE_COUNT = Range(1, most=100_000)
SAMPLING_STEPS = Range(1, most=1000)
"""Denoising steps of an image: no schedule of a supported family has more."""
SEED = Range(0, most=2**63 - 1)
"""Seeds of torch, which takes twice as many: the images after the first have the following ones."""


def setting(default: Any, help: str, allowed: Range | None = None, *, section: str = "", alias: str = "") -> Any:
    """Return a dataclass field that carries its help text and what it admits.

    Args:
        default: The default value.
        help: One sentence for the help page.
        allowed: The numbers it admits; by default all of its type.
        section: The section of the help page that starts or continues with this field; by default that of the field
            before it.
        alias: Another name for the field.
    """
    return field(default=default, metadata={"help": help, "allowed": allowed, "section": section, "alias": alias})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of a command, each a field made by `setting`."""


C = TypeVar("C", bound=Config)


def invalid_fields(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (name, problem) for each field whose value is of a wrong type or out of its range."""
    annotations = get_type_hints(type(config))
    for item in fields(config):
        value, annotation, allowed = getattr(config, item.name), annotations[item.name], item.metadata["allowed"]
        if not _admits(annotation, value):
            yield item.name, f"{item.name} must be {_describe(annotation)}, got {value!r}"
        elif not all(is_encodable(text) for text in (value if isinstance(value, tuple) else [value]) if _is_text(text)):
            yield item.name, f"{item.name} must be text without NUL that UTF-8 can hold, got {value!a}"
        elif value is not None and allowed and value not in allowed:
            yield item.name, f"{item.name} must be {allowed.requirement(value)}, got {value!r}"


def replace_invalid_fields(config: C) -> C:
    """Return ``config`` with the default for each invalid field, so that checks of the other fields can go on."""
    invalid = dict(invalid_fields(config))
    defaults: dict[str, Any] = {item.name: item.default for item in fields(config) if item.name in invalid}
    return replace(config, **defaults)


def aliases(config_type: type[Config]) -> dict[str, str]:
    """Return the field name for each alias."""
    return {item.metadata["alias"]: item.name for item in fields(config_type) if item.metadata["alias"]}


def canonical_settings(settings: Mapping[str, Any], config_type: type[Config]) -> dict[str, Any]:
    """Return ``settings`` under their field names: hyphens become underscores, aliases their field.

    Raises:
        RefusedInput: Settings are unknown, each named with a known one that is near, or given twice.
    """
    names, alias_names = [item.name for item in fields(config_type)], aliases(config_type)
    values: dict[str, Any] = {}
    problems = []
    for key, value in settings.items():
        spelled = key.replace("-", "_")
        name = alias_names.get(spelled, spelled)
        if name not in names:
            near = nearest(spelled, [*names, *alias_names])
            remedy = f"the nearest known one is {near}" if near else "none is like it, and --help lists them all"
            problems.append(f"unknown setting {key!r}: {remedy}")
        elif name in values:
            problems.append(f"{name} is given twice, the second time as {key!r}: keep one of them")
        values[name] = value
    if problems:
        raise RefusedInput(problems)
    return values


def read_settings(path: str | Path, config_type: type[Config]) -> dict[str, Any]:
    """Return the settings in a TOML file, one ``name = value`` a line, under their field names.

    Raises:
        RefusedInput: The file is missing, is not TOML, or holds unknown settings (all are named).
    """
    try:
        settings = tomllib.loads(read_text(Path(path)))
    except OSError as error:
        raise RefusedInput([f"settings file {path}: {error.strerror or error}; check --config"]) from error
    except RecursionError:
        raise RefusedInput([f"settings file {path} nests too deeply: write one name = value a line"]) from None
    except ValueError as error:
        raise RefusedInput([f"settings file {path} is not valid TOML: {error}"]) from error
    try:
        return canonical_settings(settings, config_type)
    except RefusedInput as error:
        raise RefusedInput([f"settings file {path}: {problem}" for problem in error.problems]) from error


def _admits(annotation: Any, value: object) -> bool:
    """Return whether a field of this type admits ``value``."""
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) is tuple:
        part, _ = get_args(annotation)
        return isinstance(value, tuple) and bool(value) and all(_admits(part, each) for each in value)
    if get_origin(annotation) in (Union, UnionType):
        return any(_admits(part, value) for part in get_args(annotation))
    if annotation in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if annotation is float else annotation)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)


def _describe(annotation: Any) -> str:
    """Return a field's type in words."""
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    if get_origin(annotation) is tuple:
        return _describe(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[annotation]
