"""Ways to end a run, read off a record: where each would have stopped, what it would have kept, and what it costs.

Draws are keyed by step, so a run that stops early is the beginning of the same run that goes on: one record answers for
every way that ends inside it.  A way that does not end there is *censored*: all that is known is that it goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from dvar.analysis.prefilter import Prefilter
from dvar.analysis.stop_quality import CHOOSE, ORACLE, SCORE, LearningCurve, half
from dvar.config import presets
from dvar.recordings.archive import PAIRED, RecordedRun
from dvar.stopping.rules import (
    CLIP_S,
    AllOf,
    Dvar,
    EmaPercentile,
    FixedSteps,
    Hall,
    Plateau,
    Rule,
    Trend,
)
from dvar.stopping.trace import LOSS, RELATIVE_LOSS, Trace

PICTURES = 8
"""Pictures in one measurement of CLIP-s and of Baseline.  Source: Section 4.2."""
EXTRA = ("stratified", PAIRED, "unseen")
"""Series that a rule may read by their mean, beside `eval`."""
_CLIP_EVERY = 50
BACKWARD = 1
"""Forward-equivalents of one backward pass, through activations alone: the weights that are trained are few."""


@dataclass(frozen=True)
class Strategy:
    """A rule and the pictures that its user draws: `PICTURES` every ``every`` steps, none without it.

    With ``best`` the checkpoint that scored highest is kept, as Baseline and CLIP-s do; else the last one.
    """

    name: str
    rule: Rule
    every: int | None = None
    best: bool = False


@dataclass(frozen=True)
class StopResult:
    """Where a way ended on a record: the step it trained to, the step it keeps, and how much of what it did.

    ``forwards`` counts held samples put through the model by the way's own probe, ``pictures`` those it drew to decide.
    """

    stop: int
    kept: int
    censored: bool
    forwards: int
    pictures: int


@dataclass(frozen=True)
class StrategyFamily:
    """A family of rules to be tuned: a rule for each window, as a share of Baseline's cap, and each threshold."""

    name: str
    rule: Callable[[int, float], Rule]
    thresholds: tuple[float, ...]
    shares: tuple[float, ...] = tuple(float(f"{share:.2g}") for share in np.geomspace(0.02, 0.5, 10))
    every: tuple[float, ...] = ()  # of pictures, as shares of the cap
    best: bool = False

    def grid(self) -> list[tuple[float, float, float]]:
        """Every (share, threshold, every) that is tried: at most 100."""
        return [(share, t, every) for every in self.every or (0.0,) for share in self.shares for t in self.thresholds]

    def way(self, setting: tuple[float, float, float], cap: int) -> Strategy:
        """The way that a setting means where Baseline's cap is `cap`."""
        share, threshold, every = setting
        window = max(8, round(share * cap))
        return Strategy(
            self.name, self.rule(window, threshold), max(1, round(every * cap)) if every else None, self.best
        )


def _decades(low: float, high: float) -> tuple[float, ...]:
    return tuple(float(f"{value:.2g}") for value in np.geomspace(low, high, 10))


_SHARES_OF_VARIANCE = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8)
DVAR = StrategyFamily("DVAR", lambda n, t: Dvar(n, t, strict_paper=True), _SHARES_OF_VARIANCE)
CLIP = StrategyFamily(
    "CLIP-s",
    lambda n, t: Plateau(SCORE, n, t, mode="max"),
    (0.0, 0.005, 0.01, 0.02, 0.04),
    shares=(0.02, 0.04, 0.08, 0.12, 0.2, 0.3),
    every=(0.01, 0.02, 0.05),
    best=True,
)
CONSTANT = StrategyFamily(
    "Best constant",
    lambda n, _: FixedSteps(n),
    (0.0,),
    shares=tuple(float(f"{share:.3g}") for share in np.geomspace(0.02, 1.0, 100)),
)
KINDS = (
    DVAR,
    StrategyFamily("DVAR with diagnoses", lambda n, t: Dvar(n, t), _SHARES_OF_VARIANCE),
    StrategyFamily("DVAR, relative losses", lambda n, t: Dvar(n, t, metric=RELATIVE_LOSS), _SHARES_OF_VARIANCE),
    StrategyFamily("DVAR, 32 stratified draws", lambda n, t: Dvar(n, t, metric="stratified"), _SHARES_OF_VARIANCE),
    StrategyFamily("DVAR, fresh paired draws", lambda n, t: Dvar(n, t, metric=PAIRED), _SHARES_OF_VARIANCE),
    StrategyFamily(
        "DVAR on both batches",
        lambda n, t: AllOf((Dvar(n, t), Dvar(n, t, metric="stratified"))),
        _SHARES_OF_VARIANCE,
    ),
    StrategyFamily("EMA percentile", lambda n, t: EmaPercentile(n, t), _decades(1e-5, 1e-2)),
    StrategyFamily("Hall", lambda n, t: Hall(n, t), _decades(2e-4, 5e-2)),
    StrategyFamily("Trend", lambda n, t: Trend(n, t, metric=RELATIVE_LOSS), _decades(2e-7, 2e-4)),
    StrategyFamily("Plateau of the loss", lambda n, t: Plateau(RELATIVE_LOSS, n, t), (0.0, *_decades(1e-5, 1e-2)[:9])),
    CLIP,
    CONSTANT,
)
"""Every family that is ranked.  Compositions are one of them: any rule that is called on a trace can be read."""


def cap(record: RecordedRun) -> int:
    """Baseline's own number of steps for the preset the record was made with, or as much of it as was to be trained."""
    return round(_preset(record)["max_train_steps"] * record.header.get("share", 1.0))


def in_time(record: RecordedRun) -> float:
    """How much shorter this record's training is than the paper's: the ratio of Baseline's caps."""
    return cap(record) / int(presets.settings("paper", record.method)["max_train_steps"])


def baseline(record: RecordedRun) -> Strategy:
    """The original training: to its own cap, pictures on the way, the best checkpoint by them."""
    every = max(1, round(_preset(record)["validation_steps"] * record.header.get("share", 1.0)))
    return Strategy("Baseline", FixedSteps(cap(record)), every, best=True)


def clip_s(record: RecordedRun) -> Strategy:
    """CLIP-s by the released values, its cadence and patience shortened as the training is."""
    rule, shorter = CLIP_S[record.method], in_time(record)
    shortened = replace(rule, patience=max(1, round(rule.patience * shorter)))
    return Strategy("CLIP-s", shortened, max(1, round(_CLIP_EVERY * shorter)), best=True)


def paper_dvar(record: RecordedRun, scaled: bool) -> Strategy:
    """DVAR by the paper's values; ``scaled``: with its window shortened as the training is."""
    name = "DVAR (preset scaled in time)" if scaled else "DVAR (paper's preset)"
    threshold = presets.settings("paper", record.method)["threshold"]
    return Strategy(name, Dvar(paper_window(record, scaled), threshold, strict_paper=True))


def paper_window(record: RecordedRun, scaled: bool) -> int:
    """DVAR's N by the paper; ``scaled``: shortened as the training is."""
    window = int(presets.settings("paper", record.method)["window"])
    return max(8, round(window * in_time(record))) if scaled else window


def read(way: Strategy, record: RecordedRun) -> StopResult:
    """Where a way ended on a record."""
    return read_all([way], record)[way]


def read_all(ways: Sequence[Strategy], record: RecordedRun) -> dict[Strategy, StopResult]:
    """Where each of many ways ended, every rule judged at each record of the trace, as it would have been live."""
    found: dict[Strategy, StopResult] = {}
    for every in dict.fromkeys(way.every for way in ways):
        together = [way for way in ways if way.every == every]
        stops = _stops(list(dict.fromkeys(way.rule for way in together)), record, every)
        found |= {way: _reading(way, record, stops[way.rule]) for way in together}
    return found


def readable(rule: Rule, record: RecordedRun) -> bool:
    """Whether the record holds everything that the rule reads."""
    return all(record.has(name) for name in _metrics(rule) - {SCORE, RELATIVE_LOSS}) and (
        SCORE not in _metrics(rule) or ("train", SCORE) in record.pictures
    )


def tune(kind: StrategyFamily, records: Sequence[RecordedRun]) -> tuple[float, float, float] | None:
    """The setting that keeps 90 % of the attainable gain in the fewest steps, by its mean over the records.

    Where none keeps as much, the one that keeps the most; None where no record can be read or has a gain.  Every kind
    has a grid of at most 100 points, so all are tuned alike.
    """
    tried = [found for record in records if (found := _tried(kind, record)) is not None]
    if not tried:
        return None
    kept, steps = np.mean(tried, axis=0)
    enough = kept >= ORACLE * min(1.0, float(kept.max()))
    chosen = int(np.where(enough, steps, np.inf).argmin())
    return kind.grid()[chosen]


@cache
def _tried(kind: StrategyFamily, record: RecordedRun) -> np.ndarray | None:
    """The gain kept and the steps made at every point of the kind's grid, [2, points]; None where neither can be."""
    climb = LearningCurve.of(record)
    ways = [kind.way(setting, cap(record)) for setting in kind.grid()]
    if not climb.learned or not readable(ways[0].rule, record):
        return None
    readings = read_all(ways, record)
    return np.array([[climb.at(readings[way].kept) for way in ways], [readings[way].stop for way in ways]])


def minutes(reading: StopResult, seconds: Mapping[str, float]) -> float:
    """Counts times unit seconds: updates, the way's own probe, the pictures it decides by.

    Start-up and the final pictures are not in it.  A unit that was not measured gives nan where it is needed.
    """
    spent = reading.stop * seconds.get("train", float("nan"))
    for count, unit in ((reading.forwards, "forward"), (reading.pictures, "picture")):
        spent += count * seconds.get(unit, float("nan")) if count else 0.0
    return spent / 60


def forward_equivalents(reading: StopResult, config: Mapping[str, Any]) -> float:
    """The way's work in forward passes of the U-Net for one sample.

    A trained sample is a forward and a backward pass, the latter `BACKWARD` forwards; Custom Diffusion trains as many
    class pictures beside; a picture is two passes a sampling step, since it is guided.
    """
    samples = config.get("train_batch_size", 1) * config.get("gradient_accumulation_steps", 1)
    samples *= 2 if config.get("prior_loss_weight") else 1
    picture = 2 * config.get("num_inference_steps", 50)
    return float(reading.stop * samples * (1 + BACKWARD) + reading.forwards + reading.pictures * picture)


def _preset(record: RecordedRun) -> Mapping[str, Any]:
    return presets.settings(record.config.get("preset") or "paper", record.method)


def _stops(rules: Sequence[Rule], record: RecordedRun, every: int | None) -> dict[Rule, int | None]:
    """The first step at which each rule stops, None where it never does."""
    wanted = set().union(*(_metrics(rule) for rule in rules)) if rules else set()
    if not all(map(_ours, rules)):  # what another's rule reads is not known, so it is shown all there is
        wanted |= {LOSS, *(name for name in EXTRA if record.has(name))}
    *_, whole = _replayed(record, wanted, every)
    screen = Prefilter(whole)
    due = {rule: np.flatnonzero(screen(rule)).tolist()[::-1] for rule in rules}
    found: dict[Rule, int | None] = dict.fromkeys(rules)
    for number, trace in enumerate(_replayed(record, wanted, every)):
        for rule in [rule for rule, left in due.items() if left and left[-1] == number]:
            due[rule].pop()
            if _holds(rule, trace):
                found[rule] = trace.last_step
                del due[rule]
        if not any(due.values()):
            break
    return found


def _holds(rule: Rule, trace: Trace) -> bool:
    """Whether the rule stops; of rules that must all stop, none is asked after one that does not."""
    return all(_holds(part, trace) for part in rule.rules) if isinstance(rule, AllOf) else rule(trace).stop


def _replayed(record: RecordedRun, wanted: set[str], every: int | None) -> Iterator[Trace]:
    """One trace that grows as the run did, with what the rules read; the same object each time."""
    extra = {name: dict(zip(*_means(record, name), strict=True)) for name in sorted(wanted & set(EXTRA))}
    if every and SCORE in wanted:
        steps, values = measured(record, every)
        extra[SCORE] = dict(zip(steps.tolist(), values.tolist(), strict=True))
    held = dict(zip(*(found.tolist() for found in record.series(LOSS)), strict=True)) if record.has(LOSS) else {}
    trace = Trace({"timesteps": record.trace.header.get("timesteps")})
    loss = held if wanted & {LOSS, RELATIVE_LOSS} else {}
    for row in record.trace.records:
        step = row["step"]
        trace.record(step, loss.get(step), **{name: values.get(step) for name, values in extra.items()})
        yield trace


def _means(record: RecordedRun, name: str) -> tuple[list[int], list[float]]:
    steps, values = record.series(name)
    return steps.tolist(), values.mean(axis=1).tolist()


def measured(record: RecordedRun, every: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps and mean score of `PICTURES` choosing pictures, as nearly every `every` steps as the record was scored."""
    steps, values = half(record, "train", SCORE, CHOOSE)
    kept, due = [], 0
    for index, step in enumerate(steps):
        if step >= due:
            kept.append(index)
            due = (int(step) // every + 1) * every
    return steps[kept], values[kept, :PICTURES].mean(axis=1)


def _reading(way: Strategy, record: RecordedRun, stop: int | None) -> StopResult:
    end = record.cap if stop is None else stop
    probed = {LOSS if name == RELATIVE_LOSS else name for name in _metrics(way.rule) - {SCORE}}
    forwards = sum(_forwards(record, name, end) for name in sorted(probed))
    pictures = PICTURES * (end // way.every + 1) if way.every else 0
    kept = end
    if way.best and way.every:
        steps, values = measured(record, way.every)
        kept = int(steps[steps <= end][values[steps <= end].argmax()])
    return StopResult(end, kept, stop is None, forwards, pictures)


def _forwards(record: RecordedRun, name: str, end: int) -> int:
    if name == PAIRED:
        return _forwards(record, "fresh", end) + _forwards(record, "frozen", end)
    steps, values = record.series(name)
    return int((steps <= end).sum()) * values.shape[1]


def _metrics(rule: Any) -> set[str]:
    """The metrics that a rule says it reads, those of the rules inside it included."""
    found = {rule.metric} if hasattr(rule, "metric") else set()
    return found.union(*map(_metrics, _inside(rule)))


def _ours(rule: Any) -> bool:
    """Whether a rule and those inside it are of this library."""
    return type(rule).__module__.startswith("dvar.") and all(map(_ours, _inside(rule)))


def _inside(rule: Any) -> Iterator[Any]:
    """The rules that a composition is made of."""
    for item in fields(rule) if is_dataclass(rule) else ():
        inner = getattr(rule, item.name)
        yield from (part for part in (inner if isinstance(inner, tuple) else (inner,)) if callable(part))
