"""Tables described by their columns, for every format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """A column of a table.

    Attributes:
        title: Head of the column.
        value: Name of an attribute of a row, or a function of the row.
        format: Function from a value to its text; the text of None is empty.
    """

    title: str
    value: str | Callable[[T], Any]
    format: Callable[[Any], str] = str

    def cell(self, row: T) -> str:
        """Return the text of this column for ``row``."""
        value = getattr(row, self.value) if isinstance(self.value, str) else self.value(row)
        return "" if value is None else self.format(value)


def cells(columns: Sequence[Column[T]], rows: Iterable[T]) -> list[list[str]]:
    """Return the texts of ``rows``, a list for each row."""
    return [[column.cell(row) for column in columns] for row in rows]
