"""The registry: what is registered, what other packages add, and what is refused."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from dvar import RefusedInput
from dvar.registry import Registry

SQUARE = "a plugin"


def install_packages(monkeypatch: pytest.MonkeyPatch, *plugins: EntryPoint) -> list[str]:
    """Pretend that packages with these entry points are installed; return the groups that were requested."""
    groups: list[str] = []

    def entry_points(*, group: str) -> EntryPoints:
        groups.append(group)
        return EntryPoints(plugins).select(group=group)

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    return groups


@pytest.fixture
def shapes() -> Registry[str]:
    registry: Registry[str] = Registry("shape", "dvar.shapes")
    registry.register("line", "1 side")
    registry.register("circle", "no side")
    return registry


def test_it_maps_names_to_items_in_the_order_of_registration(shapes: Registry[str]) -> None:
    assert list(shapes.items()) == [("line", "1 side"), ("circle", "no side")]
    assert (len(shapes), "line" in shapes, "dot" in shapes) == (2, True, False)
    assert shapes["circle"] == shapes.find("circle") == "no side"
    with pytest.raises(KeyError):
        shapes["dot"]


def test_a_name_that_is_not_registered_is_refused_with_the_nearest_one(shapes: Registry[str]) -> None:
    with pytest.raises(RefusedInput, match=r"^there is no shape 'cirle': the nearest is circle$"):
        shapes.find("cirle")


def test_a_name_is_registered_once(shapes: Registry[str]) -> None:
    item = shapes["line"]
    assert shapes.register("line", item) is item
    with pytest.raises(
        RefusedInput, match=r"^each shape needs a name of its own, got 'line' twice: choose another name$"
    ):
        shapes.register("line", "2 sides")
    assert shapes["line"] is item


def test_an_installed_package_adds_its_own(shapes: Registry[str], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = install_packages(monkeypatch, EntryPoint("square", f"{__name__}:SQUARE", "dvar.shapes"))
    assert shapes.find("square") == SQUARE
    assert list(shapes) == ["line", "circle", "square"]
    assert groups == ["dvar.shapes"]


def test_a_registered_name_is_found_without_loading_any_package(
    shapes: Registry[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = install_packages(monkeypatch, EntryPoint("square", "no_such_package:SQUARE", "dvar.shapes"))
    assert shapes.find("line") == "1 side"
    assert groups == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("square", "no_such_package:SQUARE", "'square' of no_such_package:SQUARE is skipped: No module named 'no_such"),
        ("square", f"{__name__}:MISSING", f"'square' of {__name__}:MISSING is skipped: "),
        ("line", f"{__name__}:SQUARE", f"'line' of {__name__}:SQUARE is skipped: each shape needs a name of its own"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_skipped_with_a_warning(
    shapes: Registry[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    install_packages(monkeypatch, EntryPoint(name, value, "dvar.shapes"))
    with pytest.warns(UserWarning, match=f"^the shape {message}"):
        assert list(shapes) == ["line", "circle"]
    assert shapes["line"] == "1 side"
