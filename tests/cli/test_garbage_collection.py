"""When garbage is collected while a command trains."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dvar.cli.garbage_collection import LOADING_THRESHOLD, collecting_late


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(777, 7, 7)
    yield gc.get_threshold()
    gc.set_threshold(*before)
    gc.unfreeze()


def test_what_is_loaded_is_left_out_of_collections_from_the_first_step_on(thresholds: tuple[int, int, int]) -> None:
    with collecting_late() as begin:
        assert gc.get_threshold() == (LOADING_THRESHOLD, 7, 7)
        begin(None)
        frozen = gc.get_freeze_count()
        assert gc.get_threshold() == thresholds
        assert frozen > 1000
        begin(None)
        assert gc.get_freeze_count() <= frozen  # what training makes is collected
    assert gc.get_freeze_count() == 0


def test_collections_are_as_before_where_training_never_begins(thresholds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="refused"), collecting_late():
        raise ValueError("refused")
    assert gc.get_threshold() == thresholds
