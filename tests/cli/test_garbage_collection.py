"""When garbage is collected while a command loads."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from dvar.cli.garbage_collection import LOADING_THRESHOLD, collecting_late


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    gc.set_threshold(777, 7, 7)
    yield gc.get_threshold()
    gc.set_threshold(*before)


def test_garbage_is_collected_as_before_from_the_first_step_on(thresholds: tuple[int, int, int]) -> None:
    with collecting_late() as begin:
        assert gc.get_threshold() == (LOADING_THRESHOLD, 7, 7)
        begin(None)
        assert gc.get_threshold() == thresholds


def test_garbage_is_collected_as_before_where_training_never_begins(thresholds: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="refused"), collecting_late():
        raise ValueError("refused")
    assert gc.get_threshold() == thresholds


def test_nothing_is_looked_through_when_the_process_ends() -> None:
    program = """
import atexit, gc
from dvar.cli.garbage_collection import collecting_late

atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # registered first, called last
with collecting_late():
    pass
print(gc.get_freeze_count())
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["0", "True"]
