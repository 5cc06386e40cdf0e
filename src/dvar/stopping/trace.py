"""The recorded series of a run, in memory and as JSON lines: the only state a stopping rule has."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dvar.errors import TraceError
from dvar.stopping.trace_format import (
    FORMAT,
    as_line,
    checked_header,
    checked_losses,
    decode,
    found_inside,
    from_line,
    names_inside,
    plain_metric,
)

LOSS = "eval"
"""The metric that a rule reads unless told otherwise: L_det, the mean over the held samples."""
RELATIVE_LOSS = "eval/first"
"""L_det with each held sample divided by its own first value, so that no timestep outweighs the others."""


class Trace:
    """What a run recorded, append-only: one record a step, most of them with losses on the held inputs.

    `header` is any JSON object that describes the run (the held timesteps, the method, ...).

    Raises: TraceError when the header is no JSON object.
    Source: Section 3.3 keeps the list of past values of L_det; the rest of a record is for the report.
    """

    def __init__(self, header: Mapping[str, Any] | None = None) -> None:
        self._header = checked_header(header or {})
        self._rows: list[dict[str, Any]] = []
        self._steps = _Column(np.int64)
        self._values = _Column(np.float64)
        self._samples = _Column(np.float64)
        self._relatives = _Column(np.float64)
        self._metrics: dict[str, _Metric] = {}

    def record(self, step: int, eval: ArrayLike | None = None, **metrics: Any) -> dict[str, Any]:
        """Append one record and return it.

        `step` is the number of updates made so far, larger than in the record before.  `eval` is one loss, or one per
        held sample (always as many): numbers, an array or a tensor, in float32 or wider.  A metric is a number, a list
        of numbers or a mapping of numbers; those that are None are left out.

        Raises: TraceError, and then nothing has been recorded.
        """
        row: dict[str, Any] = {"step": self._next_step(step)}
        losses = None if eval is None else self._checked_losses(eval)
        if RELATIVE_LOSS in metrics:
            raise TraceError(f"{RELATIVE_LOSS!r} is worked out from the losses, got it recorded: give it another name")
        if losses is not None:
            row["eval"] = losses.tolist()
        row |= {name: plain_metric(name, value) for name, value in metrics.items() if value is not None}

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
    def first_step(self) -> int:
        """The step of the oldest record, with or without an evaluation; 0 when there is none."""
        return int(self._rows[0]["step"]) if self._rows else 0

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
        """Steps and values of one metric, [m] each, over the records that hold it; read-only views.

        "seconds.probe" reads inside a metric; "eval" is L_det (`values`); "eval/first" is L_det with the losses of each
        held sample divided by its first one, so that it begins at 1 and every timestep weighs the same.

        Raises: TraceError when the metric is not a single number, or when a first loss is 0 or the samples are drawn
        anew at each record, so that there is nothing to divide by.
        Source: Section 4.5 and Figure 5: the scale of the loss depends on the timestep more than on anything else.
        """
        if not isinstance(name, str):
            raise TraceError(f"a metric is asked for by its name, got {name!r}: such as {LOSS!r}")
        if name == LOSS:
            return self.steps, self.values
        if name == RELATIVE_LOSS:
            return self.steps, self._relative()
        found = self._metrics.setdefault(name, _Metric())
        # Each row is looked at once, so that a rule judged at every step does not read the whole run every time.
        for row in self._rows[found.looked_at :]:
            value = found_inside(row, name)
            if value is not None and not isinstance(value, int | float):
                raise TraceError(f"the metric {name!r} is not one number a record: read it from `records`")
            if value is not None:
                found.steps.append(row["step"])
                found.values.append(value)
            found.looked_at += 1
        return found.steps.view(), found.values.view()

    @property
    def metric_names(self) -> list[str]:
        """What `metric` can be asked for, sorted: the names in any record, those inside a mapping with a dot."""
        names = {LOSS, RELATIVE_LOSS} if len(self.steps) else set()
        for row in self._rows:
            names |= set(names_inside({key: value for key, value in row.items() if key not in ("step", LOSS)}))
        return sorted(names)

    def line(self, index: int) -> str:
        """Record `index` as one line of JSON, without the line break."""
        return as_line(self._rows[index])

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
            file.writelines(f"{as_line(row)}\n" for row in [self._header, *self._rows])
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
        rows = [from_line(line) for line in lines]
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

    def _relative(self) -> NDArray[np.float64]:
        if self._header.get("reading") == "paired":
            raise TraceError(f"{RELATIVE_LOSS!r} needs the same samples at every record, and these are drawn anew")
        samples, known = self._samples.view(), len(self._relatives)
        if known < len(samples):  # as in `metric`, each record is looked at once
            first = samples[0]
            if not first.all():
                raise TraceError(
                    f"{RELATIVE_LOSS!r} divides by the first losses, and that of sample {int(np.argmin(first != 0))} "
                    f"is 0: read {LOSS!r}"
                )
            with np.errstate(invalid="ignore", over="ignore"):
                for value in (samples[known:] / first).sum(axis=1) / len(first):
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

    def _checked_losses(self, given: Any) -> NDArray[np.float64]:
        losses = checked_losses(given)
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
        self._file.write(f"{as_line(record)}\n".encode("ascii"))
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

    def __len__(self) -> int:
        return self._filled

    def view(self) -> NDArray[Any]:
        view = self._cells[: self._filled]
        view.flags.writeable = False
        return view


class _Metric:
    """The records of one metric among the rows that were looked at."""

    def __init__(self) -> None:
        self.steps, self.values, self.looked_at = _Column(np.int64), _Column(np.float64), 0
