"""Pages from Jinja2 templates, with one stylesheet for all."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from dvar.errors import RefusedInput
from dvar.files import write_atomically

L_DET = Markup("<i>L</i><sub>det</sub>")


def render(package: str, template: str, **context: Any) -> str:
    """Return the page that a template gives.

    Text is escaped unless it is a `markupsafe.Markup`; a name that the template uses and ``context`` lacks is an error.

    Args:
        package: Package whose ``templates`` folder holds the template; it may extend ``base.html`` of `dvar.html`.
        template: Name of the template's file.
        context: What the template shows, by name.
    """
    return load_environment(package).get_template(template).render(context) + "\n"


@cache
def load_environment(package: str) -> Environment:
    """Return the Jinja2 environment of ``package``: its own templates first, then those of `dvar.html`."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("dvar.html")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(stylesheet=read_stylesheet, L_det=L_DET)
    environment.filters.update(typeset=typeset, sentence_case=sentence_case, pluralise=pluralise)
    return environment


@cache
def read_stylesheet(names: tuple[str, ...] = ("charts.css", "style.css")) -> Markup:
    """Return the stylesheets of `dvar.html` with these names, one after the other; by default those of every page."""
    sheets = (files("dvar.html").joinpath(name) for name in names)
    return Markup("".join(sheet.read_text(encoding="utf-8") for sheet in sheets))


def typeset(text: str) -> Markup:
    """Return the text with L_det as in the paper, flags as code, and no line break before a percent sign."""
    markup = escape(text).replace("L_det", L_DET).replace(" %", "\u00a0%")
    return Markup(re.sub(r"--[a-z_]+", r"<code>\g<0></code>", str(markup)))


def sentence_case(text: str) -> str:
    """Return the text with a capital first letter and all others as they are."""
    return text[:1].upper() + text[1:]


def pluralise(count: int, noun: str) -> str:
    """Return the count with its noun in the right number: "1 step", "4 steps"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def write_page(path: Path, text: str) -> Path:
    """Write a page or a figure, whole or not at all, and return its path.

    Raises:
        RefusedInput: The file cannot be written there.
    """
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RefusedInput([f"output {path}: {error.strerror or error}; choose another place"]) from error
    return path
