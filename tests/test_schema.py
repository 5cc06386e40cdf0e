"""What differs from a schema, in words."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dvar.schema import MAX_DEPTH, find_mismatch, is_encodable, nests_too_deeply

SCHEMA = {"steps": int, "loss?": (float, None), "names": [str], "seconds": {str: float}, "kind?": ("a", "b")}
VALID = {"steps": 3, "names": ["x"], "seconds": {"train": 1}, "more": [None]}


@pytest.mark.parametrize("change", [{}, {"loss": None}, {"loss": 1.5}, {"names": []}, {"seconds": {}}, {"kind": "b"}])
def test_a_value_of_the_schema_fits(change: dict[str, Any]) -> None:
    assert find_mismatch(VALID | change, SCHEMA) == ""


@pytest.mark.parametrize(
    ("change", "mismatch"),
    [
        ({"steps": True}, "steps must be a whole number, got True"),
        ({"steps": 1.0}, "steps must be a whole number, got 1.0"),
        ({"loss": float("inf")}, "loss must be a finite number or null, got inf"),
        ({"loss": 10**400}, f"loss must be a finite number or null, got 1{'0' * 59}..."),
        ({"names": {}}, "names must be a list, got {}"),
        ({"names": ["x", 3]}, "names[1] must be text, got 3"),
        ({"names": ["\ud800"]}, "names[0] must be text, got '\\ud800'"),
        ({"names": ["a\0b"]}, "names[0] must be text, got 'a\\x00b'"),
        ({"seconds": {"train": "1"}}, "seconds.train must be a finite number, got '1'"),
        ({"kind": "c"}, "kind must be 'a' or 'b', got 'c'"),
    ],
)
def test_the_first_mismatch_is_named_with_its_place(change: dict[str, Any], mismatch: str) -> None:
    assert find_mismatch(VALID | change, SCHEMA) == mismatch


def test_a_missing_name_and_another_kind_of_document_are_named() -> None:
    assert find_mismatch({}, SCHEMA) == "steps is missing"
    assert find_mismatch([], SCHEMA) == "the value must be an object, got []"
    assert find_mismatch({"runs": [{"a": {}}]}, {"runs": [{"a": {"b": int}}]}) == "runs[0].a.b is missing"


def test_depth_is_counted_without_recursion() -> None:
    assert not nests_too_deeply(json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH))
    assert nests_too_deeply(json.loads("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)))


def test_text_that_no_file_can_hold_is_recognised() -> None:
    assert [is_encodable(text) for text in ("é🙂\n", "\udcff", "a\0")] == [True, False, False]
