"""The trace: everything measured during a run, in memory and as JSON lines; the only state of a stopping rule."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvar.errors import TraceError
from dvar.files import read_content, write_atomically
from dvar.stopping.trace_format import (
    FORMAT,
    convert_metric,
    decode_value,
    find_metric,
    format_line,
    iter_metric_names,
    parse_line,
    validate_header,
    validate_losses,
)

T = TypeVar("T")
LOSS = "eval"
"""The metric that a rule reads by default: L_det, the mean over the held samples."""
RELATIVE_LOSS = "eval/first"
"""L_det with each held sample divided by its first loss, so that no timestep outweighs the others."""


class Trace:
    """The series of everything measured during a run: at most one record per step, appended in rising order.

    Args:
        header: A JSON object that describes the run: the held timesteps, the method, the step from which rules judge
            it ("judged_from") where that is not the first, ….

    Raises:
        TraceError: The header is no JSON object.

    Source: Section 3.3 keeps the list of past values of L_det; the rest of a record is for the report.
    """

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self._header = validate_header(header or {})
        self._rows: list[dict[str, Any]] = []
        self._steps = _Column(np.int64)
        self._values = _Column(np.float64)
        self._samples = _Column(np.float64)
        self._relatives = _Column(np.float64)
        self._metrics: dict[str, _Metric] = {}
        self._derived: dict[Hashable, Any] = {}

    def record(self, step: int, eval: ArrayLike | None = None, **metrics: Any) -> dict[str, Any]:
        """Append one record and return it.

        Args:
            step: Number of updates made so far, larger than in the record before.
            eval: One loss, or one per held sample, [B], the same B in every record: numbers, an array or a tensor, in
                float32 or wider.
            metrics: A number, a list of numbers or a mapping of numbers each; those that are None are left out.

        Raises:
            TraceError: The step, the losses or a metric do not fit; then nothing has been recorded.
        """
        row: dict[str, Any] = {"step": self._next_step(step)}
        losses = None if eval is None else self._validate_losses(eval)
        if RELATIVE_LOSS in metrics:
            raise TraceError(f"{RELATIVE_LOSS!r} is computed from the losses, got it as a metric: give it another name")
        if losses is not None:
            row["eval"] = losses.tolist()
        row |= {name: convert_metric(name, value) for name, value in metrics.items() if value is not None}

        self._rows.append(row)
        self._derived.clear()
        if losses is not None:
            self._steps.append(row["step"])
            self._samples.append(losses)
            with np.errstate(invalid="ignore", over="ignore"):
                self._values.append(losses.mean())
        return dict(row)

    @property
    def steps(self) -> NDArray[np.int64]:
        """Steps of the records with an evaluation, [n]; a read-only view."""
        return self._steps.view()

    @property
    def values(self) -> NDArray[np.float64]:
        """L_det at `steps`, [n]: the mean over the held samples, in float64; a read-only view."""
        return self._values.view()

    @property
    def samples(self) -> NDArray[np.float64]:
        """Losses at `steps`, [n, B], one column per held sample; a read-only view."""
        samples = self._samples.view()
        return samples if len(samples) else samples.reshape(0, 0)

    @property
    def first_step(self) -> int:
        """The step of the oldest record, with or without an evaluation; 0 when there is none."""
        return int(self._rows[0]["step"]) if self._rows else 0

    @property
    def last_step(self) -> int:
        """The step of the newest record, with or without an evaluation; 0 when there is none."""
        return int(self._rows[-1]["step"]) if self._rows else 0

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records as dicts: ``step``, ``eval`` (a list) where there is one, and the metrics."""
        return [dict(row) for row in self._rows]

    @property
    def header(self) -> dict[str, Any]:
        """The header as in a file, with the number of the format under "dvar_trace"."""
        return dict(self._header)

    @property
    def judged_from(self) -> int:
        """The step from which rules judge, as if no record had been made before: 0 unless the header says another."""
        return int(self._header.get("judged_from", 0))

    def __len__(self) -> int:
        return len(self._rows)

    def metric(self, name: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return steps and values of one metric, [m] each, over the records that hold it, as read-only views.

        Args:
            name: A metric; "seconds.probe" reads inside a mapping. "eval" is L_det (`values`), "eval/first" is L_det
                with the losses of each held sample divided by its first one, so that it begins at 1 and every timestep
                weighs the same.

        Raises:
            TraceError: The metric is not a single number per record; or, for "eval/first", a first loss is 0 or the
                samples are drawn again at each record.

        Source: Section 4.5 and Figure 5: the scale of the loss depends on the timestep more than on anything else.
        """
        if not isinstance(name, str):
            raise TraceError(f"a metric is read by its name, got {name!r}: pass a text, such as {LOSS!r}")
        if name == LOSS:
            return self.steps, self.values
        if name == RELATIVE_LOSS:
            return self.steps, self._relative()
        metric = self._metrics.setdefault(name, _Metric())
        # Each row is read once, so that a rule called at every step does not read the whole run every time.
        for row in self._rows[metric.rows_read :]:
            value = find_metric(row, name)
            if value is not None and not isinstance(value, int | float):
                raise TraceError(f"the metric {name!r} is not one number per record: read it from `records`")
            if value is not None:
                metric.steps.append(row["step"])
                metric.values.append(value)
            metric.rows_read += 1
        return metric.steps.view(), metric.values.view()

    def derive(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what ``compute`` gives for the records so far, computed once until the next record.

        Many rules that judge the same record then share their work.
        """
        if key not in self._derived:
            self._derived[key] = compute()
        value: T = self._derived[key]
        return value

    @property
    def metric_names(self) -> list[str]:
        """All names that `metric` takes, sorted: those in any record, those inside a mapping with a dot."""
        names = {LOSS, RELATIVE_LOSS} if len(self.steps) else set()
        for row in self._rows:
            names |= set(iter_metric_names({key: value for key, value in row.items() if key not in ("step", LOSS)}))
        return sorted(names)

    def line(self, index: int) -> str:
        """Return record ``index`` as one line of JSON, without the line break."""
        return format_line(self._rows[index])

    def cut(self, step: int) -> Trace:
        """Return a new trace with the same header and the records up to and including ``step``."""
        trace = Trace(self._header)
        for row in self._rows:
            if row["step"] <= step:
                trace.record(**row)
        return trace

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write header and records to ``path``, one line each; a reader sees the old file or the new, never a part."""
        lines = "".join(f"{format_line(row)}\n" for row in [self._header, *self._rows])
        write_atomically(Path(path), lines.encode("ascii"))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trace:
        """Return the trace that `write` or a `TraceFile` wrote to ``path``, bit for bit.

        An incomplete last line, left by a crash, is dropped with a warning.

        Raises:
            TraceError: The file is no trace, or is damaged elsewhere; the message names the line.
        """
        lines = read_content(Path(path)).splitlines()
        rows = [parse_line(line) for line in lines]
        if not rows or rows[0] is None or rows[0].get("dvar_trace") != FORMAT:
            raise TraceError(f'{path} is no trace: its first line must be a header with "dvar_trace": {FORMAT}')
        if rows[-1] is None:
            warnings.warn(f"{path}: the last line is incomplete, as after a crash, and is dropped", stacklevel=2)
            rows.pop()
        try:
            trace = cls(rows[0])
        except TraceError as error:
            raise TraceError(f"{path}: {error}") from error
        for number, row in enumerate(rows[1:], start=2):
            if row is None or "step" not in row or "self" in row:
                raise TraceError(f"{path}, line {number} is no record: restore the file, or cut it before that line")
            try:
                trace.record(**decode_value(row))
            except TraceError as error:
                raise TraceError(f"{path}, line {number}: {error}") from error
        return trace

    def _relative(self) -> NDArray[np.float64]:
        if self._header.get("reading") == "paired":
            raise TraceError(
                f"{RELATIVE_LOSS!r} needs the same samples at every record, got a paired trace: read {LOSS!r}"
            )
        samples, count = self._samples.view(), len(self._relatives)
        if count < len(samples):  # as in `metric`, each record is read once
            first = samples[0]
            if not first.all():
                raise TraceError(
                    f"{RELATIVE_LOSS!r} divides by the first losses, and that of sample {int(np.argmin(first != 0))} "
                    f"is 0: read {LOSS!r}"
                )
            with np.errstate(invalid="ignore", over="ignore"):
                for value in (samples[count:] / first).sum(axis=1) / len(first):
                    self._relatives.append(value)
        return self._relatives.view()

    def _next_step(self, step: Any) -> int:
        try:
            number = operator.index(step)
        except TypeError:
            raise TraceError(f"a step is a whole number of updates, got {step!r}: pass how many were made") from None
        if not 0 <= number <= np.iinfo(np.int64).max:
            raise TraceError(f"a step counts updates from 0, got {number}: pass how many were made")
        if self._rows and number <= self.last_step:
            raise TraceError(
                f"steps must grow, got {number} after {self.last_step}: "
                "pass the losses and the metrics of a step in one call, and cut the trace before repeating steps"
            )
        return number

    def _validate_losses(self, values: Any) -> NDArray[np.float64]:
        losses = validate_losses(values)
        width = self._samples.view().shape[1:] or losses.shape
        if losses.shape != width:
            raise TraceError(
                f"this trace holds {width[0]} losses per record, got {losses.size}: evaluate the same batch"
            )
        return losses


class TraceFile:
    """A trace on disk that grows by whole lines: once `append` returns, a killed process loses nothing of it.

    An existing file is continued, without an incomplete last line.

    Args:
        path: The file, such as trace.jsonl.
        header: The header of a new file; an existing one must have the same.

    Raises:
        TraceError: The file at ``path`` is no trace, or has another header.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        trace = Trace.read(self.path) if self.path.exists() else Trace(header)
        if header is not None and Trace(header).header != trace.header:
            raise TraceError(f"{self.path} has another header: move it away, or resume with the settings that made it")
        trace.write(self.path)
        self._last_step = trace.last_step if len(trace) else -1
        self._file = self.path.open("ab")

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record, as `Trace.record` returns it, and hand it to the operating system.

        Raises:
            TraceError: Its step does not follow the last one in the file.
        """
        step = record["step"]
        if step <= self._last_step:
            raise TraceError(f"{self.path} already holds step {self._last_step}, got step {step}: cut the trace first")
        self._file.write(f"{format_line(record)}\n".encode("ascii"))
        self._file.flush()
        self._last_step = step

    def sync(self) -> None:
        """Wait until the lines are on the disk itself, so that they survive a power cut."""
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


class _Column:
    """A growing array: appending is cheap, and a view never changes once it is returned."""

    def __init__(self, dtype: type[np.generic]) -> None:
        self._dtype = dtype
        self._cells: NDArray[Any] = np.empty(0, dtype)
        self._filled = 0

    def append(self, cell: Any) -> None:
        if self._filled == len(self._cells):
            cells: NDArray[Any] = np.empty((max(64, 2 * self._filled), *np.shape(cell)), self._dtype)
            if self._filled:
                cells[: self._filled] = self._cells
            self._cells = cells
        self._cells[self._filled] = cell
        self._filled += 1

    def __len__(self) -> int:
        return self._filled

    def view(self) -> NDArray[Any]:
        view = self._cells[: self._filled]
        view.flags.writeable = False
        return view


class _Metric:
    """The records of one metric among the rows read so far."""

    def __init__(self) -> None:
        self.steps, self.values, self.rows_read = _Column(np.int64), _Column(np.float64), 0
