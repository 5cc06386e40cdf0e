"""Cadences: how many measurements an octave holds, and that a step is due whatever the length of the run."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvar.errors import RefusedInput
from dvar.stopping.cadence import PerOctave, count_due, format_cadence, is_due


@given(st.integers(1, 40), st.integers(0, 12))
def test_every_octave_holds_as_many_measurements_once_a_step_is_short_enough(count: int, octave: int) -> None:
    start = 2**octave
    due = [step for step in range(start + 1, 2 * start + 1) if is_due(PerOctave(count), step)]
    assert len(due) <= count
    if start > 1.5 * count:  # a part of the octave is then longer than a step: log(2) / count * start > 1
        assert len(due) == count
    if 2 * start < count:
        assert len(due) == start


def test_early_steps_are_all_due() -> None:
    # 16 log2(27) = 76.08 and 16 log2(28) = 76.92 have the same whole part, and no two neighbours before them.
    assert next(step for step in range(99) if not is_due(PerOctave(16), step)) == 28
    assert is_due(PerOctave(1), 0)
    assert [step for step in range(1, 70) if is_due(PerOctave(1), step)] == [1, 2, 4, 8, 16, 32, 64]


@given(st.integers(1, 50), st.integers(0, 500))
def test_a_whole_number_is_a_distance_in_steps(every: int, last: int) -> None:
    assert count_due(every, last) == last // every + 1


def test_the_count_is_that_of_the_steps_that_are_due() -> None:
    assert count_due(PerOctave(1), 64) == 8


def test_a_cadence_may_begin_late() -> None:
    # From 32 on, six times an octave: 32 · 2^(k / 6), rounded up.
    due = [step for step in range(130) if is_due(PerOctave(6, first=32), step)]
    assert due == [0, 32, 36, 41, 46, 51, 58, 64, 72, 81, 91, 102, 115, 128]
    assert [step for step in range(20) if is_due(PerOctave(1, first=5), step)] == [0, 5, 8, 16]


def test_cadences_in_words() -> None:
    assert (format_cadence(10), format_cadence(PerOctave(16))) == ("every 10", "16 times an octave")
    assert format_cadence(PerOctave(6, first=32)) == "6 times an octave from step 32 on"


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_no_measurement_is_no_cadence(count: float) -> None:
    with pytest.raises(RefusedInput, match="1 or more measurements an octave, got"):
        PerOctave(count)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", [-1, 1.5, True])
def test_a_cadence_begins_at_a_step(first: float) -> None:
    with pytest.raises(RefusedInput, match="begins at a step, 0 or more, got"):
        PerOctave(6, first)  # type: ignore[arg-type]
