"""Flags of a command from the fields of a settings class."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from cyclopts import Group, Parameter, Token, convert

from dvar.config.fields import aliases

if TYPE_CHECKING:
    from dvar.config.fields import Config


def whole(kind: Any, tokens: Sequence[Token]) -> Any:
    """A whole number as it was written; by itself Cyclopts reads 1.5 as 2."""
    if "." in tokens[0].value:
        raise ValueError(f"must be a whole number, got {tokens[0].value}")
    return convert(kind, tokens)


def with_flags_of(settings: type[Config]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command a flag for each field of a settings class; its keyword arguments are then the flags given.

    A field that the command takes itself, under the same name, gets none.
    """

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        flags = [parameter for parameter in own if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {parameter.name for parameter in flags}
        hints, others, groups = get_type_hints(settings), aliases(settings), dict[str, Group]()
        title = ""
        for item in (item for item in fields(settings) if item.name not in taken):
            title = item.metadata["section"] or title
            group = groups.setdefault(title, Group(title, sort_key=len(flags)))
            names = [item.name, *(alias for alias, name in others.items() if name == item.name)]
            hint = hints[item.name]
            shown = Parameter(
                name=[f"--{name}" for name in names],
                help=item.metadata["help"],
                group=group,
                negative_iterable=(),
                converter=whole if int in (hint, *get_args(hint)) else None,
                show_default=", ".join if isinstance(item.default, tuple) else None,
            )
            flag = inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=item.default)
            flags.append(flag.replace(annotation=Annotated[hint, shown]))
        command.__signature__ = inspect.Signature(flags)  # type: ignore[attr-defined]
        return command

    return decorate


REFUSED, FAILED, INTERRUPTED = 2, 1, 130


def say(line: str) -> None:
    print(f"dvar: {line}", file=sys.stderr, flush=True)
