"""One record of a trace: what may be in it, and its line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.errors import TraceError

FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """Plain numbers, lists and mappings made fit for JSON: nan and the infinities become "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {name: encode(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode(value: Any) -> Any:
    """The inverse of `encode`, bit for bit."""
    if isinstance(value, dict):
        return {name: decode(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """The header as JSON gives it back, with the number of the format.

    Raises: TraceError when it is no JSON object of this format.
    """
    try:
        checked: dict[str, Any] = json.loads(json.dumps({"dvar_trace": FORMAT, **header}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TraceError(
            f"a trace's header must be a JSON object without nan or infinities ({error}): leave it out"
        ) from None
    if checked["dvar_trace"] != FORMAT:
        raise TraceError(
            f"this version reads traces of format {FORMAT}, got {checked['dvar_trace']!r}: use the one that wrote it"
        )
    return checked


def checked_losses(given: Any) -> NDArray[np.float64]:
    """[B] losses in float64, one for each held sample.

    Raises: TraceError when they are no numbers, in less than float32, none at all or of more dimensions.
    """
    if hasattr(given, "detach"):  # a torch tensor, known by what it can do: this room must not import torch
        given = given.detach().cpu()
    try:
        losses = np.atleast_1d(np.asarray(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TraceError(f"losses must be numbers in float32 or wider ({error}): compute them in float32") from None
    if losses.dtype.kind not in "iuf" or losses.dtype == np.float16:
        # Half precision has about 20 values in the whole range of L_det: the window would look constant at once.
        raise TraceError(f"losses must be numbers in float32 or wider, got {losses.dtype}: compute them in float32")
    if losses.ndim != 1 or not losses.size:
        raise TraceError(
            f"losses must be one number, or one per held sample, got the shape {losses.shape}: "
            "average over the other dimensions"
        )
    return losses.astype(np.float64)


def plain_metric(name: str, value: Any) -> Any:
    """The metric in Python's own numbers, so that a record means the same live and read back."""
    if isinstance(value, Mapping):
        return {str(key): plain_metric(name, item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [plain_metric(name, item) for item in value]
    if not isinstance(value, int | float):
        raise TraceError(f"the metric {name!r} must be made of numbers, got {value!r}: leave it out")
    return value


def found_inside(row: Mapping[str, Any], name: str) -> Any:
    """What a record holds under a name of `names_inside`, None where it holds nothing."""
    if name in row:  # a host's own name may hold a dot
        return row[name]
    found: Any = row
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def names_inside(row: Mapping[str, Any]) -> Iterator[str]:
    """The names of all single numbers in a record, those inside a mapping with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in names_inside(value))
        elif isinstance(value, int | float):
            yield name


def as_line(row: Mapping[str, Any]) -> str:
    """A record or a header as one line of JSON, without the line break."""
    return json.dumps(encode(row), allow_nan=False)


def from_line(line: bytes) -> dict[str, Any] | None:
    """What a line holds, still encoded; None where it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
