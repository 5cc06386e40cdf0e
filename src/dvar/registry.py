"""A registry: the things of one kind by name, with those that other packages add."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from dvar.errors import RefusedInput, suggest

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to the registered things of one kind, in the order of registration.

    Installed packages add their own under the entry point group ``plugins``: the entry point is named after the thing,
    and its value is the thing itself. Plugins are loaded when a name is not registered yet, and before the registry is
    listed. A plugin that cannot be loaded is skipped with a warning.

    Args:
        kind: What is registered, in the singular, for messages: "rule", "method".
        plugins: The entry point group of other packages, such as "dvar.rules".
    """

    def __init__(self, kind: str, plugins: str) -> None:
        self.kind, self.plugins = kind, plugins
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str, item: T) -> T:
        """Register ``item`` under ``name`` and return it.

        Raises:
            RefusedInput: Another item has this name.
        """
        if self._items.get(name, item) is not item:
            raise RefusedInput([f"each {self.kind} needs a name of its own, got {name!r} twice: choose another name"])
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
            RefusedInput: Nothing is registered under this name; the message suggests the nearest one, if any is near.
        """
        if name not in self:
            raise RefusedInput([f"there is no {self.kind} {name!r}: {suggest(name, self)}"])
        return self[name]

    def __iter__(self) -> Iterator[str]:
        self._load_plugins()
        return iter(self._items)

    def __len__(self) -> int:
        self._load_plugins()
        return len(self._items)

    def _load_plugins(self) -> None:
        """Register the items of all installed plugins, once."""
        if self._loaded:
            return
        self._loaded = True
        from importlib.metadata import entry_points  # 20 ms, which every start of dvar would wait for

        for plugin in entry_points(group=self.plugins):
            try:
                self.register(plugin.name, plugin.load())
            except Exception as error:
                # A broken package must not break what does not use it.
                warnings.warn(f"the {self.kind} {plugin.name!r} of {plugin.value} is skipped: {error}", stacklevel=2)
