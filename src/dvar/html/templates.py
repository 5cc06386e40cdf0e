"""Pages from Jinja2 templates: text is escaped, an undefined name is an error, and one stylesheet serves all."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


@cache
def environment(package: str) -> Environment:
    """Return the Jinja2 environment of ``package``: its own templates first, then those of `dvar.html`."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("dvar.html")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["stylesheet"] = stylesheet
    return made


def render(package: str, template: str, **context: Any) -> str:
    """Return the page that ``template`` of ``package`` gives for ``context``.

    Markup is escaped unless it is a `markupsafe.Markup`, or an `Html` of `dvar.html.elements`.
    """
    return environment(package).get_template(template).render(context)


@cache
def stylesheet() -> Markup:
    """Return the stylesheet of every page, that of its charts included."""
    sheets = (files("dvar.html").joinpath(name) for name in ("charts.css", "style.css"))
    return Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets))
