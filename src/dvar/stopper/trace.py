"""The recorded series of a run, in memory and as JSON lines: the only state a stopping rule has."""

from __future__ import annotations

import json
import math
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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


class Trace:
    """What a run recorded, append-only: one record a step, most of them with losses on the held inputs.

    `header` is any JSON object that describes the run (the held timesteps, the method, ...).

    Raises: TraceError when the header is no JSON object.
    Source: Section 3.3 keeps the list of past values of L_det; the rest of a record is for the report.
    """

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self._header = _checked_header(header or {})
        self._rows: list[dict[str, Any]] = []
        self._steps = _Column(np.int64)
        self._values = _Column(np.float64)
        self._samples = _Column(np.float64)

    def record(self, step: int, eval: ArrayLike | None = None, **metrics: Any) -> dict[str, Any]:
        """Append one record and return it.

        `step` is the number of updates made so far, larger than in the record before.  `eval` is one loss, or one per
        held sample (always as many): numbers, an array or a tensor, in float32 or wider.  A metric is a number, a list
        of numbers or a mapping of numbers; those that are None are left out.

        Raises: TraceError, and then nothing has been recorded.
        """
        row: dict[str, Any] = {"step": self._next_step(step)}
        losses = None if eval is None else self._checked_losses(eval)
        if losses is not None:
            row["eval"] = losses.tolist()
        row |= {name: _plain(name, value) for name, value in metrics.items() if value is not None}

        self._rows.append(row)
        if losses is not None:
            self._steps.append(row["step"])
            self._samples.append(losses)
            with np.errstate(invalid="ignore", over="ignore"):
                self._values.append(losses.mean())
        return dict(row)

    @property
    def steps(self) -> NDArray[np.int64]:
        """[n] steps of the records that hold an evaluation; a read-only view."""
        return self._steps.view()

    @property
    def values(self) -> NDArray[np.float64]:
        """[n] L_det at `steps`: the mean over the held samples, taken in float64; a read-only view."""
        return self._values.view()

    @property
    def samples(self) -> NDArray[np.float64]:
        """[n, B] losses at `steps`, one column per held sample; a read-only view."""
        samples = self._samples.view()
        return samples if len(samples) else samples.reshape(0, 0)

    @property
    def last_step(self) -> int:
        """The step of the newest record, with or without an evaluation; 0 when there is none."""
        return int(self._rows[-1]["step"]) if self._rows else 0

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records as dicts: `step`, `eval` (a list) where there is one, and the metrics."""
        return [dict(row) for row in self._rows]

    @property
    def header(self) -> dict[str, Any]:
        """The header as its line in a file holds it, with the number of the format under "dvar_trace"."""
        return dict(self._header)

    def __len__(self) -> int:
        return len(self._rows)

    def metric(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Steps and values of one metric, [m] each, over the records that hold it; "seconds.probe" reads inside one.

        Raises: TraceError when the metric is not a single number.
        """
        found = [(row["step"], value) for row in self._rows if (value := _inside(row, name)) is not None]
        if any(not isinstance(value, int | float) for _, value in found):
            raise TraceError(f"the metric {name!r} is not one number a record: read it from `records`")
        steps, values = zip(*found, strict=True) if found else ((), ())
        return np.array(steps, np.int64), np.array(values, np.float64)

    def line(self, index: int) -> str:
        """Record `index` as one line of JSON, without the line break."""
        return _line(self._rows[index])

    def cut(self, step: int) -> Trace:
        """A new trace with the same header and the records up to and including `step`."""
        kept = Trace(self._header)
        for row in self._rows:
            if row["step"] <= step:
                kept.record(**row)
        return kept

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write header and records to `path`, one line each; a reader meets the old file or the new, never a part."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with part.open("w", encoding="ascii", newline="\n") as file:
            file.writelines(f"{_line(row)}\n" for row in [self._header, *self._rows])
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trace:
        """The trace that `write` or a `TraceFile` left at `path`, equal to the last bit.

        A last line that was torn by a crash is dropped with a warning.
        Raises: TraceError naming the line, when the file is no trace or is damaged elsewhere.
        """
        lines = Path(path).read_bytes().splitlines()
        rows = [_parsed(line) for line in lines]
        if not rows or rows[0] is None or rows[0].get("dvar_trace") != FORMAT:
            raise TraceError(f'{path} is no trace: its first line must be a header with "dvar_trace": {FORMAT}')
        if rows[-1] is None:
            warnings.warn(f"{path}: the last line was torn while it was written and is dropped", stacklevel=2)
            rows.pop()
        trace = cls(rows[0])
        for number, row in enumerate(rows[1:], start=2):
            if row is None or "step" not in row:
                raise TraceError(f"{path}, line {number} is no record: restore the file, or cut it before that line")
            try:
                trace.record(**decode(row))
            except TraceError as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
        return trace

    def _next_step(self, step: Any) -> int:
        try:
            number = operator.index(step)
        except TypeError:
            raise TraceError(f"a step is a whole number of updates, got {step!r}") from None
        if number < 0:
            raise TraceError(f"a step counts updates from 0, got {number}")
        if self._rows and number <= self.last_step:
            raise TraceError(
                f"steps must grow, got {number} after {self.last_step}: "
                "pass the losses and the metrics of a step in one call, and cut the trace before repeating steps"
            )
        return number

    def _checked_losses(self, given: Any) -> NDArray[np.float64]:
        losses = _losses(given)
        width = self._samples.view().shape[1:] or losses.shape
        if losses.shape != width:
            raise TraceError(f"this trace holds {width[0]} losses a record, got {losses.size}: evaluate the same batch")
        return losses


class TraceFile:
    """A trace on disk that grows by whole lines: once `append` returns, a killed process loses nothing of it.

    An existing file is continued, less a torn last line; its header must then equal `header`, where one is given.

    Raises: TraceError when the file at `path` is no trace or has another header.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        trace = Trace.read(self.path) if self.path.exists() else Trace(header)
        if header is not None and Trace(header).header != trace.header:
            raise TraceError(
                f"{self.path} has another header: move it away, or resume with the settings it was made with"
            )
        trace.write(self.path)
        self._last_step = trace.last_step if len(trace) else -1
        self._file = self.path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record, as `Trace.record` returns it, and hand it to the operating system.

        Raises: TraceError when its step does not follow the last one in the file.
        """
        step = record["step"]
        if step <= self._last_step:
            raise TraceError(f"{self.path} already holds step {self._last_step}, got step {step}: cut the trace first")
        self._file.write(f"{_line(record)}\n".encode("ascii"))
        self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Wait until the lines are on the disk itself, so that a power cut spares them too."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; it can be opened again with another `TraceFile`."""
        self._file.close()

    def __enter__(self) -> TraceFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Curve:
    """A stretch of L_det, each value weighted by the steps it stands for.

    A record stands for the steps since the one before it; the first stands for its own step alone.  So at cadence 1
    every weight is 1, and every average below is the plain one.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]
    weights: NDArray[np.int64]

    @classmethod
    def of(cls, trace: Trace, first_step: int = 0) -> Curve:
        """The evaluations of `trace` from `first_step` on, as if the ones before had never been made."""
        start = int(np.searchsorted(trace.steps, first_step))
        steps, values = trace.steps[start:], trace.values[start:]
        return cls(steps, values, np.diff(steps, prepend=steps[:1] - 1))

    def last(self, window: int) -> Curve:
        """The records with a step in (t - window, t], where t is the newest.

        Of the steps that the oldest of them stands for, only those inside count: else a window read at a coarse cadence
        would be wider than one read at every step, and the same curve would stop later, by up to three cadences.
        """
        before = self.steps[-1] - window
        start = int(np.searchsorted(self.steps, before, side="right"))
        weights = np.minimum(self.weights[start:], self.steps[start:] - before)
        return Curve(self.steps[start:], self.values[start:], weights)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def span(self) -> int:
        """Steps from the first record to the last."""
        return int(self.steps[-1] - self.steps[0])

    @property
    def spread(self) -> float:
        """Largest minus smallest value; not finite as soon as one value is not."""
        with np.errstate(invalid="ignore", over="ignore"):
            return float(np.max(self.values) - np.min(self.values))

    @property
    def mean(self) -> float:
        """Weighted mean."""
        return float(self.values[0] + np.dot(self.weights / np.sum(self.weights), self.values - self.values[0]))

    def variance(self, unit: float) -> float:
        """Weighted variance with ddof 0, in units of `unit` squared, in two passes over float64.

        The first value is subtracted first, so that a curve without any change has exactly no variance; the unit keeps
        the squares of very large or small losses within range.
        """
        values = (self.values - self.values[0]) / unit
        deviations = values - np.dot(self.weights, values) / np.sum(self.weights)
        return float(np.dot(self.weights, deviations * deviations) / np.sum(self.weights))

    def slope(self) -> float:
        """Change per step of the weighted least-squares line."""
        ages = self.steps - np.average(self.steps, weights=self.weights)
        return float(np.dot(self.weights * ages / np.dot(self.weights * ages, ages), self.values - self.mean))


class _Column:
    """A growing array: appending is cheap, and a view once given never changes."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype
        self._cells: NDArray[Any] = np.empty(0, dtype)
        self._filled = 0

    def append(self, cell: Any) -> None:
        if self._filled == len(self._cells):
            grown: NDArray[Any] = np.empty((max(64, 2 * self._filled), *np.shape(cell)), self._dtype)
            if self._filled:
                grown[: self._filled] = self._cells
            self._cells = grown
        self._cells[self._filled] = cell
        self._filled += 1

    def view(self) -> NDArray[Any]:
        view = self._cells[: self._filled]
        view.flags.writeable = False
        return view


def _checked_header(header: Mapping[str, Any]) -> dict[str, Any]:
    try:
        checked: dict[str, Any] = json.loads(json.dumps({"dvar_trace": FORMAT, **header}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise TraceError(f"a trace's header must be a JSON object without nan or infinities: {error}") from None
    if checked["dvar_trace"] != FORMAT:
        raise TraceError(f"this version reads traces of format {FORMAT}, got {checked['dvar_trace']!r}")
    return checked


def _losses(given: Any) -> NDArray[np.float64]:
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
        raise TraceError(f"losses must be one number, or one per held sample, got the shape {losses.shape}")
    return losses.astype(np.float64)


def _plain(name: str, value: Any) -> Any:
    """The metric in Python's own numbers, so that a record means the same live and read back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(name, item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(name, item) for item in value]
    if not isinstance(value, int | float):
        raise TraceError(f"the metric {name!r} must be made of numbers, got {value!r}")
    return value


def _inside(row: Mapping[str, Any], name: str) -> Any:
    found: Any = row
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(encode(row), allow_nan=False)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
