"""Flags of a command from the fields of its config class."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import Field, fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from cyclopts import Group, Parameter, Token, convert

from dvar.cli.help_pages import print_panel
from dvar.config.fields import aliases
from dvar.errors import RefusedInput

if TYPE_CHECKING:
    from dvar.config.fields import Config

Command = Callable[..., int]
MAX_DIGITS = 30  # of a number; more have no use, and Python refuses to read thousands
_SECTIONS = ("Data", "Model", "Method", "Objective", "Stopping", "Sampling", "Output")
"""The sections of training in their order on a help page; those of other commands come as their fields do."""


def with_flags_of(
    config: type[Config], defaults: Config | None = None, several: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Return a decorator that gives a command one flag for each field of a config class.

    The command's keyword arguments are then the flags that were given, and no others: a preset or a file may set the
    rest. A field that the command takes itself, under the same name, gets no flag.

    Args:
        config: The config class.
        defaults: The values that the help page shows; those of the class by default.
        several: Fields whose flag takes all values that follow it; the flag of other tuples is repeated.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        own_names = {parameter.name for parameter in parameters}
        hints, other_names, section = get_type_hints(config), aliases(config), ""
        groups: dict[str, Group] = {}
        for field in fields(config):
            section = field.metadata["section"] or section
            if field.name in own_names:
                continue
            names = [field.name, *(alias for alias, name in other_names.items() if name == field.name)]
            group = groups.setdefault(section, _group(section, len(groups)))
            default = getattr(defaults or config, field.name, inspect.Parameter.empty)  # none: the flag is required
            flag = _flag(field, names, hints[field.name], group, default, field.name in several)
            parameter = inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default)
            parameters.append(parameter.replace(annotation=Annotated[hints[field.name], flag]))
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def convert_numbers(hint: Any, tokens: Sequence[Token]) -> Any:
    """Convert numbers in plain digits; Cyclopts by itself reads 1.5 as the whole number 2, and 1_9 as 19."""
    whole = _holds(hint, int)
    for token in tokens:
        if whole and not re.fullmatch(r"[+-]?[0-9]+", token.value):
            raise ValueError(f"must be a whole number, got {_shorten(token.value)}")
        if "_" in token.value or len(token.value) > MAX_DIGITS:
            raise ValueError(f"must be a number, got {_shorten(token.value)}")
    return convert(hint, tokens)


def raise_problems(problems: Sequence[str]) -> None:
    """Raise `RefusedInput` if there are any problems; call it before anything slow is imported."""
    if problems:
        raise RefusedInput(problems)


def option_value(tokens: Sequence[str], name: str) -> str | None:
    """Return the value that a command line gives to an option, spelled with underscores or hyphens; None if none."""
    words = iter(tokens)
    for word in words:
        flag, _, value = word.partition("=")
        if flag.replace("-", "_") == f"__{name}":
            return value or next(words, None)
    return None


def _group(section: str, place: int) -> Group:
    key = _SECTIONS.index(section) if section in _SECTIONS else len(_SECTIONS) + place
    return Group(section or "Options", sort_key=key, help_formatter=print_panel)


def _flag(
    field: Field[Any], names: Sequence[str], hint: Any, group: Group, default: object, several: bool
) -> Parameter:
    return Parameter(
        name=[f"--{name}" for name in names],
        help=field.metadata["help"],
        group=group,
        negative=[f"--no_{field.name}"] if _holds(hint, bool) else (),
        converter=convert_numbers if _holds(hint, int) or _holds(hint, float) else None,
        consume_multiple=several,
        show_default=False if default is None or default is False else _format_default,
    )


def _holds(hint: Any, kind: type) -> bool:
    """Return whether a type is this one, or is made of it."""
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))


def _shorten(value: str) -> str:
    return value if len(value) <= MAX_DIGITS else f"{value[:MAX_DIGITS]}..."


def _format_default(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
