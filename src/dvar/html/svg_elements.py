"""A builder of SVG elements that escapes text."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup


def element(name: str, /, *children: str | None, **attributes: str | float | None) -> Markup:
    """Return one element; children and attributes that are not `Markup` are text and are escaped.

    Args:
        name: The tag.
        children: Content; None is left out.
        attributes: By name, with ``_`` for ``-`` (``stroke_width``) and at the end of a keyword (``class_``); None is
            left out.
    """
    pairs = (
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in attributes.items()
        if value is not None
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, join(pairs), join(children))


def join(children: Iterable[str | None]) -> Markup:
    """Return the children one after the other, without those that are None."""
    return Markup().join(child for child in children if child is not None)
