"""Registries: what a name stands for, in one place for each kind of thing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from dvar.errors import RefusedInput, nearest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A read-only mapping from names to the registered things of one kind, in the order of registration.

    Installed packages add their own under the entry point group ``plugins``: an entry point named after what it
    registers, whose value is the object itself. They are loaded when a name is not among the registered ones, and
    before the registry is listed.

    Args:
        kind: What is registered, in the singular, for messages: "rule", "method".
        plugins: The entry point group that other packages use, such as "dvar.rules".
    """

    def __init__(self, kind: str, plugins: str) -> None:
        self.kind, self.plugins = kind, plugins
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, item: T) -> T:
        """Register ``item`` under ``name`` and return it.

        Raises:
            RefusedInput: The name is taken by another item.
        """
        if self._items.get(name, item) is not item:
            raise RefusedInput([f"{self.kind} {name!r} is registered already: choose another name"])
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        """Return what ``name`` stands for.

        Raises:
            KeyError: Nothing is registered under this name.
        """
        if name not in self._items:
            self._load_plugins()
        return self._items[name]

    def find(self, name: str) -> T:
        """Return what ``name`` stands for, for a name that a user gave.

        Raises:
            RefusedInput: Nothing is registered under this name; the message suggests the nearest one.
        """
        if name not in self:
            raise RefusedInput([f"there is no {self.kind} {name!r}: the nearest is {nearest(name, self)}"])
        return self[name]

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(self._items)

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._items)

    def _load_plugins(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for plugin in entry_points(group=self.plugins):
            self.register(plugin.name, plugin.load())
