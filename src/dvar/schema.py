"""Schemas of JSON values, and what differs from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

MAX_DEPTH = 64
"""Objects and lists inside one another that a file may have; none of ours has ten."""
_SHOWN = 60  # characters of a value in a message
_WORDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a finite number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    None: "null",
}


def find_mismatch(value: Any, schema: Any, name: str = "") -> str:
    """Return how a JSON value differs from a schema, in words; empty where it fits.

    Args:
        value: The value, as `json.loads` returns it.
        schema: `int`, `float` (a finite number), `str` (text that UTF-8 can hold), `bool`, `dict`, `list` or None; a
            text, which is that very text; ``[item]``, a list; ``{str: item}``, an object of any names;
            ``{"name": item, "other?": item}``, an object with these names, of which those with a question mark may be
            missing, and any others; or a tuple of alternatives.
        name: The name of the value in the message.
    """
    return next(_iter_mismatches(value, schema, name), "")


def nests_too_deeply(value: Any) -> bool:
    """Return whether a JSON value has more than `MAX_DEPTH` objects and lists inside one another."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for item in level for inner in _items(item) if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def is_encodable(text: str) -> bool:
    """Return whether a text can be written as UTF-8 and be part of a path: JSON may hold half a character, or NUL."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _items(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _iter_mismatches(value: Any, schema: Any, name: str) -> Iterator[str]:
    match schema:
        case tuple():
            if all(find_mismatch(value, part) for part in schema):
                yield _format(value, " or ".join(_describe(part) for part in schema), name)
        case [item]:
            if not isinstance(value, list):
                yield _format(value, "a list", name)
                return
            for index, inner in enumerate(value):
                yield from _iter_mismatches(inner, item, f"{name}[{index}]")
        case {**names} if names:
            if not isinstance(value, dict):
                yield _format(value, "an object", name)
                return
            for key, item in names.items():
                yield from _iter_mismatches_of(value, key, item, f"{name}." if name else "")
        case _:
            if not _fits(value, schema):
                yield _format(value, _describe(schema), name)


def _iter_mismatches_of(value: Mapping[str, Any], key: Any, item: Any, prefix: str) -> Iterator[str]:
    """Yield what is wrong with one name of an object, or with all of them where the name is `str`."""
    if key is str:
        for each, inner in value.items():
            yield from _iter_mismatches(inner, item, f"{prefix}{each}")
        return
    plain = key.removesuffix("?")
    if plain in value:
        yield from _iter_mismatches(value[plain], item, f"{prefix}{plain}")
    elif plain == key:
        yield f"{prefix}{key} is missing"


def _fits(value: Any, schema: Any) -> bool:
    if schema is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if schema is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if schema is str:
        return isinstance(value, str) and is_encodable(value)
    if schema is None or isinstance(schema, str):
        return bool(value == schema)
    return isinstance(value, schema)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _describe(schema: Any) -> str:
    if isinstance(schema, str):
        return repr(schema)
    kind = type(schema) if isinstance(schema, dict | list) else schema
    return _WORDS[kind]


def _format(value: Any, requirement: str, name: str) -> str:
    text = ascii(value)
    excerpt = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return f"{name or 'the value'} must be {requirement}, got {excerpt}"
