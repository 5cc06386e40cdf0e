"""Tables of the HTML pages."""

from __future__ import annotations

from typing import NamedTuple

from dvar.html.tables import Column, cells


class Mug(NamedTuple):
    colour: str
    volume: float | None


def test_a_table_has_a_text_for_each_row_and_column() -> None:
    columns = [
        Column[Mug]("Colour", "colour"),
        Column[Mug]("Volume", "volume", lambda litres: f"{litres:g} l"),
        Column[Mug]("Initial", lambda mug: mug.colour[0]),
    ]
    assert cells(columns, [Mug("red", 0.25), Mug("blue", None)]) == [["red", "0.25 l", "r"], ["blue", "", "b"]]
