"""The format of a trace: checks of a header and a record, and a record as one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dvar.errors import TraceError
from dvar.files import parse_json
from dvar.schema import find_mismatch

FORMAT = 1
_LARGEST = 2**1000  # of a whole number that float64 holds too
HEADER = {
    "timesteps?": [float],
    "judged_from?": int,
    "log?": {"format?": str, "file?": str, "metric?": str, "preferred_to?": [str], "cadence_setting?": str},
    "launch?": {"script": str, "rule": str, "settings": {str: (float, str)}},
}
"""What a trace's header must look like where it holds these; anything else may be in it too."""
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode_value(value: Any) -> Any:
    """Return numbers, lists and mappings as JSON can hold them: nan and infinities as "nan", "inf" and "-inf"."""
    if isinstance(value, Mapping):
        return {name: encode_value(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode_value(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def decode_value(value: Any) -> Any:
    """Return the value that `encode_value` encoded, bit for bit."""
    if isinstance(value, dict):
        return {name: decode_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [decode_value(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def validate_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header as JSON gives it back, with the number of the format.

    Raises:
        TraceError: It is no JSON object of this format.
    """
    try:
        validated: dict[str, Any] = parse_json(json.dumps({"dvar_trace": FORMAT, **header}, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise TraceError(
            f"a trace's header must be a JSON object without nan or infinities ({error}): leave it out"
        ) from None
    if validated["dvar_trace"] != FORMAT:
        raise TraceError(
            f"this version reads traces of format {FORMAT}, got {validated['dvar_trace']!r}: use the one that wrote it"
        )
    if mismatch := find_mismatch(validated, HEADER):
        raise TraceError(f"{mismatch} in a trace's header: correct it, or leave it out")
    return validated


def validate_losses(values: Any) -> NDArray[np.float64]:
    """Return the losses of the held samples in float64, [B].

    Raises:
        TraceError: They are not numbers, less precise than float32, none at all or of more than one dimension.
    """
    if hasattr(values, "detach"):  # a torch tensor; this module must not import torch
        values = values.detach().cpu()
    try:
        losses = np.atleast_1d(np.asarray(values))
    except (TypeError, ValueError, RuntimeError) as error:
        raise TraceError(f"losses must be numbers in float32 or wider ({error}): compute them in float32") from None
    if losses.dtype.kind not in "iuf" or losses.dtype == np.float16:
        # Half precision has about 20 values in the whole range of L_det, so a window would soon look constant.
        raise TraceError(f"losses must be numbers in float32 or wider, got {losses.dtype}: compute them in float32")
    if losses.ndim != 1 or not losses.size:
        raise TraceError(
            f"losses must be one number, or one per held sample, got the shape {losses.shape}: "
            "average over the other dimensions"
        )
    return losses.astype(np.float64)


def convert_metric(name: str, value: Any) -> Any:
    """Return the metric in Python's own numbers, so that a record is the same live and read back.

    Raises:
        TraceError: Something in it is not a number.
    """
    if isinstance(value, Mapping):
        return {str(key): convert_metric(name, item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [convert_metric(name, item) for item in value]
    if not isinstance(value, int | float) or (isinstance(value, int) and abs(value) > _LARGEST):
        raise TraceError(f"the metric {name!r} must be made of numbers, got {ascii(value)[:60]}: leave it out")
    return value


def find_metric(row: Mapping[str, Any], name: str) -> Any:
    """Return what a record holds under a name of `iter_metric_names`; None where it holds nothing."""
    if name in row:  # another program's name may contain a dot
        return row[name]
    value: Any = row
    for key in name.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def iter_metric_names(row: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of all single numbers in a record, those inside a mapping with a dot."""
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from (f"{name}.{inner}" for inner in iter_metric_names(value))
        elif isinstance(value, int | float):
            yield name


def format_line(row: Mapping[str, Any]) -> str:
    """Return a record or a header as one line of JSON, without the line break."""
    return json.dumps(encode_value(row), allow_nan=False)


def parse_line(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, still encoded; None where it is no JSON object."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
