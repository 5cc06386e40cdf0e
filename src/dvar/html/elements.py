"""HTML and SVG as values that escape by default.

A plain string given to `element` is text and is escaped; only what `element` itself returned is markup. So a prompt or
a file name can never become part of the page's structure, and no caller has to remember to escape.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

VOID = frozenset({"br", "img", "meta"})


class Html(str):
    """Text that is markup already; Jinja2 does not escape it."""

    def __html__(self) -> str:
        return self


def join(children: Iterable[str | None]) -> Html:
    """Return the children one after the other: markup as it is, text escaped, None left out."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children if child is not None))


def element(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """Return one element.

    Attribute names lose a trailing underscore and turn the others into hyphens (`class_`, `stroke_width`); None and
    False leave the attribute out, True gives it without a value.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def page_head(title: str, style: str, *, images: bool = True) -> Html:
    """Return the head of a page that loads nothing and runs no script; ``images`` may stand in the page itself."""
    policy = "default-src 'none'; " + ("img-src data:; " if images else "") + "style-src 'unsafe-inline'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", title),
        element("style", Html(style)),
    )


def _attribute(key: str, value: str | float | bool | None) -> str:
    key = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {key}" if value is True else f' {key}="{escape(str(value))}"'
