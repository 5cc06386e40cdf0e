"""The page of experiments in HTML."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files

from dvar.html.elements import Html, element, page_head
from dvar.paper.result import ExperimentResult, Plot, Table, _drawn


def page(exhibits: Sequence[ExperimentResult], facts: Sequence[str]) -> str:
    """Return one page with every exhibit that loads nothing and runs no script; `facts` open it."""
    sheets = (files("dvar.html").joinpath(name) for name in ("charts.css", "style.css"))
    style = "".join(sheet.read_text(encoding="utf-8") for sheet in sheets)
    head = page_head("The laboratory · dvar", style)
    links = [element("li", element("a", one.title, href=f"#{one.name}")) for one in exhibits]
    top = element(
        "header",
        element("p", "dvar", class_="eyebrow"),
        element("h1", "The laboratory"),
        *(element("p", fact, class_="standfirst") for fact in facts),
        element("ul", *links, class_="contents"),
    )
    body = element("body", element("main", top, *(section(one) for one in exhibits)), class_="laboratory")
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def section(exhibit: ExperimentResult) -> Html:
    """The exhibit as a part of a page."""
    missing = element("p", element("b", "Not made: "), exhibit.missing, class_="missing") if exhibit.missing else None
    said = [element("p", line) for line in exhibit.says]
    plots = [element("figure", _picture(plot), element("figcaption", plot.caption)) for plot in exhibit.plots]
    tables = [_table(table) for table in exhibit.tables]
    return element("section", element("h2", exhibit.title), missing, *said, *tables, *plots, id=exhibit.name)


def _table(table: Table) -> Html:
    head = element("tr", *(element("th", name, scope="col") for name in table.columns))
    rows = [
        element("tr", *(_cell(text, (row, column) in table.bold) for column, text in enumerate(cells)))
        if len(cells) > 1
        else element("tr", element("th", cells[0], colspan=len(table.columns), scope="rowgroup"))
        for row, cells in enumerate(table.rows)
    ]
    shown = element("table", element("thead", head), element("tbody", *rows), class_="numbers-table")
    return element("figure", element("div", shown, class_="wide"), element("figcaption", table.caption))


def _cell(text: str, bold: bool) -> Html:
    return element("td", element("b", text) if bold else text)


def _picture(plot: Plot) -> Html:
    drawn = base64.b64encode(_drawn(plot, "svg")).decode()
    return element("img", src=f"data:image/svg+xml;base64,{drawn}", alt=plot.caption, class_="chart")
