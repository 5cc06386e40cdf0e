"""Curves that other software recorded, read into a trace: `read_log("metrics.csv")`, `read_log("logs/")`.

The format is recognised by what a file holds (`dvar.stopping.logs.formats`).  Of the curves in it, a rule can judge a
loss on fixed inputs; a training loss, whose timesteps are resampled at every step, is only read when named.
"""

from __future__ import annotations

import difflib
import os
import re
import warnings
from pathlib import Path
from typing import Any

from dvar.errors import RefusedInput
from dvar.stopping.logs.formats import OWN, format_of, listed, log_in
from dvar.stopping.trace import LOSS, Trace

RANDOM_TIMESTEPS = (
    "this is a training loss with random timesteps; its variance says nothing about convergence, "
    "unless it was measured on a fixed batch"
)
TRAPS = {
    "loss/validation/step_average": "kohya's scripts overwrite only a part of this average after the first epoch, so "
    "that it lags behind the loss: read loss/validation/epoch_average",
    "loss/validation/epoch_average": "kohya's scripts count its steps in epochs in TensorBoard: give windows in epochs",
}
"""What is known to be wrong with a curve, by its name."""

_HELD = frozenset({"eval", "val", "valid", "validation", "test", "held", "heldout", "det", "stable", "fixed", "probe"})
_NO_LOSS = frozenset({"divergence", "lr", "time", "runtime", "seconds", "std"})
# A run is resumed a few times at most; a table in no order goes back at every other row.
_GOES_BACK = 10
# Of so many records, so few different values in each tell of rounding.
_MANY, _FEW = 100, 0.1


def read_log(path: str | os.PathLike[str], metric: str | None = None, step: str | None = None) -> Trace:
    """The curve in a log, or in a folder with one, as the losses of a trace.

    `metric` names the curve; without it there must be exactly one loss on fixed inputs, to go by its name.  `step`
    names the column of steps in a table, where none of `STEP_COLUMNS` is right.  A trace of our own keeps its samples
    unless `metric` names another of its metrics.

    Where steps go back, the run was resumed: what was recorded before from that step on is left out, with a warning.
    So warned too: a training loss, a curve with a known fault, one that was rounded when it was written, and a last
    line that was torn, which is dropped.

    Raises: RefusedInput when the format is not known (the known ones are named), the curve cannot be told (the
    candidates are named), a line is damaged, a value is no number, or a step has two values; TraceError when a trace is
    damaged.
    """
    path = Path(path)
    if not path.exists():
        raise RefusedInput([f"the log must be a file or a folder, and {path} does not exist: check the path"])
    path = log_in(path)
    known = format_of(path)
    if step and not known.has_columns:
        raise RefusedInput([f"{path} counts its steps itself, got the column {step!r}: leave it out"])
    if known is OWN:
        return _own(path, metric)
    curves: dict[str, list[tuple[int | None, float | str]]] = {}
    for at, curve, value in known.points(path, step):
        curves.setdefault(curve, []).append((at, value))
    curves = {curve: found for curve, found in curves.items() if any(isinstance(value, float) for _, value in found)}
    chosen = _chosen(path, list(curves), metric)
    return _traced(path, chosen, curves[chosen], {"log": {"format": known.name, "metric": chosen}})


# --- which curve ----------------------------------------------------------------------------------------------------


def _chosen(path: Path, names: list[str], metric: str | None) -> str:
    if not names:
        raise RefusedInput([f"a log must hold numbers over steps, and {path} holds none: check what was recorded"])
    if metric is None:
        return _only_held_loss(path, names)
    chosen = [name for name in names if metric in (name, _plain(name))]
    if len(chosen) != 1:
        there = listed(chosen or difflib.get_close_matches(metric, names, n=len(names), cutoff=0.0))
        raise RefusedInput([f"{path} holds {'several' if chosen else 'no'} {metric!r}: name one of {there}"])
    if _is_training_loss(chosen[0]):
        warnings.warn(f"{chosen[0]}: {RANDOM_TIMESTEPS}", stacklevel=3)
    return chosen[0]


def _only_held_loss(path: Path, names: list[str]) -> str:
    losses = [name for name in names if _is_loss(name)]
    held = [name for name in losses if _is_held(name)]
    if len(held) == 1:
        return held[0]
    if held:
        told = listed([f"{name} ({TRAPS[_plain(name)]})" if _plain(name) in TRAPS else name for name in held])
        raise RefusedInput([f"{path} holds {len(held)} losses on fixed inputs: choose one with --metric, of {told}"])
    if losses:
        raise RefusedInput(
            [
                f"{path} holds no loss on fixed inputs, only {listed(losses)}: {RANDOM_TIMESTEPS}, "
                "in which case name it with --metric"
            ]
        )
    raise RefusedInput([f"{path} holds no loss by its name: choose one with --metric, of {listed(names)}"])


def _plain(name: str) -> str:
    """The metric's own name: W&B's charts put the name of the run before it."""
    return name.rpartition(" - ")[2]


def _words(name: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", _plain(name))}


def _is_held(name: str) -> bool:
    return bool(_words(name) & _HELD)


def _is_loss(name: str) -> bool:
    words = _words(name)
    return (bool(words & {"loss", "mse", "det"}) or _plain(name) == LOSS) and not words & _NO_LOSS


def _is_training_loss(name: str) -> bool:
    return _is_loss(name) and not _is_held(name)


# --- from points to a trace -----------------------------------------------------------------------------------------


def _traced(path: Path, name: str, found: list[tuple[int | None, float | str]], header: dict[str, Any]) -> Trace:
    kept: dict[int, float] = {}
    resumed: list[int] = []
    for step, value in found:
        where = f"{path}: {name} at step {step}"
        if step is None:
            raise RefusedInput([f"{path}: {name} is recorded without a step: name the right column of steps"])
        if isinstance(value, str):
            raise RefusedInput([f"{where} must be a number, got {value!r}: mend it, or leave the record out"])
        last = next(reversed(kept), -1)
        if step < last:
            resumed.append(step)
            kept = {at: before for at, before in kept.items() if at < step}
        if step == last and kept[step] != value and not (value != value and kept[step] != kept[step]):
            raise RefusedInput(
                [f"{where} has two values, {kept[step]:.6g} and {value:.6g}: average them, or choose another --metric"]
            )
        kept[step] = value
    if len(resumed) > _GOES_BACK:
        raise RefusedInput([f"{path}: the steps of {name} go back {len(resumed)} times: sort the log by its steps"])
    if resumed:
        again = ", ".join(f"{step}" for step in resumed)
        warnings.warn(
            f"{name}: resumed from step {again}; what was recorded before from there on is left out", stacklevel=3
        )
    if _plain(name) in TRAPS:
        warnings.warn(f"{name}: {TRAPS[_plain(name)]}", stacklevel=3)
    trace = Trace(header)
    for step, value in kept.items():
        trace.record(step, value)
    _tell_of_rounding(name, list(kept.values()))
    return trace


def _tell_of_rounding(name: str, values: list[float]) -> None:
    different = len(set(values))
    if len(values) >= _MANY and 1 < different < _FEW * len(values):
        warnings.warn(
            f"{name} takes only {different} values in {len(values)} records: it was rounded when it was written, and "
            "a rounded loss seems to stand still too early",
            stacklevel=4,
        )


def _own(path: Path, metric: str | None) -> Trace:
    trace = Trace.read(path)
    if metric is None or metric == LOSS:
        return trace
    steps, values = trace.metric(metric)
    if not len(steps):
        raise RefusedInput([f"{path} holds no {metric!r}: name one of {listed(trace.metric_names)}"])
    if _is_training_loss(metric):
        warnings.warn(f"{metric}: {RANDOM_TIMESTEPS}", stacklevel=3)
    read = Trace({"log": {"format": OWN.name, "metric": metric}})
    for step, value in zip(steps, values, strict=True):
        read.record(int(step), float(value))
    return read
