"""Reads a curve that another program logged into a trace: `read_log("metrics.csv")`, `read_log("logs/")`."""

from __future__ import annotations

import difflib
import itertools
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.logs.formats import TRACE_FORMAT, LogFormat, find_log, format_names, recognise_format
from dvar.logs.tables import INCOMPLETE_LINE
from dvar.stopping.trace import LOSS, Trace

RANDOM_TIMESTEPS = (
    "this is a training loss with random timesteps; its variance says nothing about convergence, "
    "unless it was measured on a fixed batch"
)
Points = list[tuple[int | None, float | str]]
"""The points of a curve in the order of the log: step and value."""
KNOWN_FAULTS = {
    "loss/validation/step_average": "kohya's scripts overwrite only a part of this average after the first epoch, so "
    "that it lags behind the loss: read loss/validation/epoch_average",
    "loss/validation/epoch_average": "kohya's scripts count its steps in epochs in TensorBoard: give windows in epochs",
}
"""Known faults of curves, by the name of the curve."""

_HELD = frozenset({"eval", "val", "valid", "validation", "test", "held", "heldout", "det", "stable", "fixed", "probe"})
# Where a program logs several held losses, and one of them is over all of their samples.
_POOLED = frozenset({"pooled", "total", "mean"})
_NO_LOSS = frozenset({"divergence", "lr", "time", "runtime", "seconds", "std"})
# An unsorted table goes back at every other row; a run that is resumed often goes on for more rows in between.
_MAX_RESUMES, _RESUMED_SHARE = 10, 0.25
# By so much of its value the loss of a step differs at most where it is measured again after a resume.
_REPEATED = 1e-3
# So few different values per record, in at least so many records, are a sign of rounding.
_MANY_RECORDS, _ROUNDED_SHARE = 100, 0.1


def read_log(
    path: str | os.PathLike[str], metric: str | None = None, step: str | None = None, *, live: bool = False
) -> Trace:
    """Return a curve of a log as the losses of a trace.

    The format is recognised by the content (`dvar.logs.formats`). A rule can judge a loss on fixed inputs; a
    training loss, whose timesteps are drawn anew at every step, is read only when it is named, with a warning.

    Where steps go back, the run was resumed: what was recorded before from that step on is left out, with a warning. A
    curve with a known fault, a rounded curve and an incomplete last line, which is dropped, are warned of too.

    Args:
        path: A file, or a folder with one.
        metric: The curve; by default the only loss on fixed inputs, to judge by its name, or the only one of several
            that is called pooled, total or mean.
        step: The column of steps of a table; by default the first of `STEP_COLUMNS` that is present.
        live: Whether another program may still be writing the log. Its last line is then left out while it is
            incomplete, without a warning.

    Returns:
        A trace whose losses are the curve. Its header has, under "log", the format, the file, the metric, and the
        others that it was preferred to. A trace of dvar keeps its samples, unless ``metric`` names another metric.

    Raises:
        RefusedInput: The format is unknown (the known ones are named), there is no single candidate for the curve (the
            candidates are named), a line is damaged, a value is not a number, or a step has two values.
        TraceError: A trace of dvar is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise RefusedInput([f"the log must be a file or a folder, and {path} does not exist: check the path"])
    try:
        path = find_log(path)
        log_format = recognise_format(path)
    except OSError as error:
        raise RefusedInput([f"the log {path} cannot be read ({error.strerror or error}): name another"]) from error
    if step and not log_format.has_step_column:
        raise RefusedInput([f"{path} counts its steps itself, got the column {step!r}: leave it out"])
    with warnings.catch_warnings():
        if live:
            warnings.filterwarnings("ignore", message=f".*{INCOMPLETE_LINE}")
        if log_format is TRACE_FORMAT:
            return _read_trace(path, metric)
        curves: dict[str, Points] = {}
        for at, curve, value in log_format.read_points(path, step):
            curves.setdefault(curve, []).append((at, value))
    names = [curve for curve, points in curves.items() if any(isinstance(value, float) for _, value in points)]
    name, others = _choose_curve(path, names, metric)
    points = curves[name]
    if live and log_format.is_text_table and not _ends_in_line_break(path):
        points = points[:-1]  # a number that is being written is a number already, with fewer digits
    resumed = any(_goes_back(other) for other in curves.values())
    return _build_trace(path, name, points, _describe_log(log_format, path, name, others), resumed=resumed)


def _describe_log(log_format: LogFormat, path: Path, name: str, others: list[str]) -> dict[str, Any]:
    description: dict[str, Any] = {"format": log_format.title, "file": path.name, "metric": name}
    if others:
        description["preferred_to"] = others
    if log_format.cadence_setting:
        description["cadence_setting"] = log_format.cadence_setting
    return {"log": description}


def _ends_in_line_break(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read() in (b"\n", b"\r")


# --- which curve ----------------------------------------------------------------------------------------------------


def _choose_curve(path: Path, names: list[str], metric: str | None) -> tuple[str, list[str]]:
    """Return the curve that ``metric`` names, or the loss on fixed inputs and those that it is preferred to."""
    if not names:
        raise RefusedInput([f"a log must hold numbers over steps, and {path} holds none: check what was recorded"])
    if metric is None:
        return _find_held_loss(path, names)
    matches = [name for name in names if metric in (name, _strip_run(name))]
    if len(matches) != 1:
        candidates = format_names(matches or difflib.get_close_matches(metric, names, n=len(names), cutoff=0.0))
        raise RefusedInput([f"{path} holds {'several' if matches else 'no'} {metric!r}: name one of {candidates}"])
    if _is_training_loss(matches[0]):
        warnings.warn(f"{matches[0]}: {RANDOM_TIMESTEPS}", stacklevel=3)
    return matches[0], []


def _find_held_loss(path: Path, names: list[str]) -> tuple[str, list[str]]:
    """Return the only loss on fixed inputs, to judge by the names, or that over all of them, and the others."""
    losses = [name for name in names if _is_loss(name)]
    held = [name for name in losses if _is_held(name)]
    pooled = [name for name in held if _is_pooled(name)]
    for choice in (held, pooled):
        if len(choice) == 1:
            return choice[0], [name for name in held if name != choice[0]]
    if held:
        candidates = format_names([f"{name} ({fault})" if (fault := _find_fault(name)) else name for name in held])
        raise RefusedInput(
            [f"{path} holds {len(held)} losses on fixed inputs: choose one with --metric, of {candidates}"]
        )
    if losses:
        raise RefusedInput(
            [
                f"{path} holds no loss on fixed inputs, only {format_names(losses)}: {RANDOM_TIMESTEPS}, "
                "in which case name it with --metric"
            ]
        )
    raise RefusedInput([f"{path} holds no loss by its name: choose one with --metric, of {format_names(names)}"])


def _strip_run(name: str) -> str:
    """Return the metric's own name: W&B's charts put the name of the run before it."""
    return name.rpartition(" - ")[2]


def _find_fault(name: str) -> str | None:
    return KNOWN_FAULTS.get(_strip_run(name))


def _split_words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", _strip_run(name))}


def _is_held(name: str) -> bool:
    return bool(_split_words(name) & _HELD)


def _is_pooled(name: str) -> bool:
    """Return whether the last part of a name says that the loss is over all samples, and nothing else."""
    words = _split_words(name.rpartition("/")[2])
    return bool(words & _POOLED) and words <= _POOLED | _HELD | {"average", "loss", "mse"}


def _is_loss(name: str) -> bool:
    words = _split_words(name)
    return (bool(words & {"loss", "mse", "det"}) or _strip_run(name) == LOSS) and not words & _NO_LOSS


def _is_training_loss(name: str) -> bool:
    return _is_loss(name) and not _is_held(name)


# --- from points to a trace -----------------------------------------------------------------------------------------


def _goes_back(points: Points) -> bool:
    """Return whether the steps of a curve go back, as after a resume."""
    steps = [step for step, _ in points if step is not None]
    return any(later < step for step, later in itertools.pairwise(steps))


def _build_trace(path: Path, name: str, points: Points, header: dict[str, Any], *, resumed: bool) -> Trace:
    """Return the trace of one curve, with warnings about what was left out or may be wrong.

    Args:
        path: The log.
        name: The curve.
        points: Its points.
        header: The header of the trace.
        resumed: Whether another curve of the log shows that the run was resumed.
    """
    values, resumes = _order_points(path, name, points, resumed=resumed)
    if len(resumes) > max(_MAX_RESUMES, _RESUMED_SHARE * len(points)):
        raise RefusedInput([f"{path}: the steps of {name} go back {len(resumes)} times: sort the log by its steps"])
    if resumes:
        steps = ", ".join(map(str, resumes))
        warnings.warn(
            f"{name}: resumed from step {steps}; what was recorded before from there on is left out", stacklevel=3
        )
    if fault := _find_fault(name):
        warnings.warn(f"{name}: {fault}", stacklevel=3)
    trace = Trace(header)
    for step, value in values.items():
        trace.record(step, value)
    _warn_of_rounding(name, list(values.values()))
    return trace


def _order_points(path: Path, name: str, points: Points, *, resumed: bool) -> tuple[dict[int, float], list[int]]:
    """Return the values by step, those of the last attempt at each, and the steps at which the run was resumed.

    Where a run is resumed from a checkpoint after which there was one record, that step is repeated and none goes back.
    """
    values: dict[int, float] = {}
    resumes: list[int] = []
    for step, value in points:
        where = f"{path}: {name} at step {step}"
        if step is None:
            raise RefusedInput([f"{path}: {name} is recorded without a step: name the right column of steps"])
        if isinstance(value, str):
            raise RefusedInput([f"{where} must be a number, got {value!r}: fix it, or leave the record out"])
        last_step = next(reversed(values), -1)
        differs = step == last_step and values[step] != value and not (value != value and values[step] != values[step])
        if step < last_step or (differs and (resumed or math.isclose(values[step], value, rel_tol=_REPEATED))):
            resumes.append(step)
            values = {earlier: before for earlier, before in values.items() if earlier < step}
        elif differs:
            raise RefusedInput(
                [
                    f"{where} has two values, {values[step]:.6g} and {value:.6g}: "
                    "average them, or choose another --metric"
                ]
            )
        values[step] = value
    return values, resumes


def _warn_of_rounding(name: str, values: list[float]) -> None:
    distinct = len(set(values))
    if len(values) >= _MANY_RECORDS and 1 < distinct < _ROUNDED_SHARE * len(values):
        warnings.warn(
            f"{name} takes only {distinct} values in {len(values)} records: it was rounded when it was written, and "
            "a rounded loss appears constant too early",
            stacklevel=4,
        )


def _read_trace(path: Path, metric: str | None) -> Trace:
    """Return a trace of dvar, or one of its metrics as the losses of a trace."""
    trace = Trace.read(path)
    if metric is None or metric == LOSS:
        return trace
    steps, values = trace.metric(metric)
    if not len(steps):
        raise RefusedInput([f"{path} holds no {metric!r}: name one of {format_names(trace.metric_names)}"])
    if _is_training_loss(metric):
        warnings.warn(f"{metric}: {RANDOM_TIMESTEPS}", stacklevel=3)
    how: dict[str, Any] = {name: trace.header[name] for name in ("judged_from", "reading") if name in trace.header}
    curve = Trace({**how, **_describe_log(TRACE_FORMAT, path, metric, [])})
    for step, value in zip(steps, values, strict=True):
        curve.record(int(step), float(value))
    return curve
