"""Which rule stops best?  Every rule of the library on recorded runs, beside the oracle and two controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.eligibility import EARLY, ENOUGH, ERRORS, JITTERS, WAY, Eligibility, gate_of
from dvar.analysis.stop_quality import (
    CHOOSE,
    ORACLE,
    PREMATURE,
    Estimate,
    LearningCurve,
    StopQuality,
    half,
    interval,
    outcome,
    over_concepts,
)
from dvar.analysis.strategies import CONSTANT, KINDS, StopResult, Strategy, StrategyFamily
from dvar.errors import RefusedInput
from dvar.paper.result import ExperimentResult, Plot, Provenance, Table, number, title
from dvar.paper.style import INK, NOISE, SIGNAL, SOFT, axes
from dvar.recordings.archive import RecordedRun, RecordingArchive

OTHER_SHARES = (0.8, 0.95)
RANDOM_DRAWS = 20
CONTROL = CONSTANT.name
ORACLE_NAME = "Oracle of the other half"


@dataclass(frozen=True)
class RankedRule:
    """One rule on every record of a scope: what its stops were worth, and what deciding cost beside the training.

    There is a record for each outcome; a random step has several outcomes a record.  ``cost`` is in forward passes of
    one sample; ``setting`` says how it was tuned.
    """

    rule: str
    setting: str
    records: tuple[RecordedRun, ...]
    outcomes: tuple[StopQuality, ...]
    cost: float
    stops: tuple[float, ...]

    @property
    def errors(self) -> list[float]:
        """How far each stop lies from the oracle, in octaves, before or after."""
        return [abs(one.distance) for one in self.outcomes]


def make(shelf: RecordingArchive) -> ExperimentResult:
    """The ranking, with one setting per method and with one for all, and for each method alone, of the methods that
    pass the gate or could not be put to it.
    """
    gates = {method: gate_of(shelf, method) for method in shelf.methods}
    methods = [method for method, gate in gates.items() if not (gate and gate.failed)]
    if not methods:
        raise RefusedInput(["rules are ranked on no method here: " + " ".join(_kept_out(gates))])
    records = tuple(r for method in methods for r in shelf.of(method) if LearningCurve.of(r).learned)
    if not records:
        raise RefusedInput(["no recorded run has learned anything that its scores show: record longer runs"])
    own = {method: tuned(shelf.for_tuning(method)) for method in methods}
    common = dict.fromkeys(own, tuned(tuple(r for method in methods for r in shelf.for_tuning(method))))
    found = {
        "one setting per method": ranking(records, own),
        "one setting, in shares of Baseline's cap, for all methods": ranking(records, common),
    }
    told = [line for how, ranked in found.items() for line in _told(how, ranked)]
    for method in methods if len(methods) > 1 else ():
        alone = tuple(record for record in records if record.method == method)
        found |= {f"{title(method)} alone, its own setting": ranking(alone, own)} if alone else {}
    tables = tuple(_table(f"scope-{number}", how, ranked) for number, (how, ranked) in enumerate(found.items()))
    plots = tuple(_plot(f"scope-{number}", how, ranked) for number, (how, ranked) in enumerate(found.items()))
    unlearned = sum(len(shelf.of(method)) for method in methods) - len(records)
    said = (_ceiling(records), *_kept_out(gates), *_skipped(shelf, methods, unlearned), *told)
    return ExperimentResult("rules", "Which rule stops best?", said, (*tables, _gates(gates, records)), plots[:2])


def tuned(records: Sequence[RecordedRun]) -> dict[str, tuple[float, float, float] | None]:
    """The setting of every kind of rule, by its name, tuned on these records."""
    return {kind.name: strategies.tune(kind, records) for kind in KINDS}


def ranking(
    records: Sequence[RecordedRun], settings: Mapping[str, Mapping[str, tuple[float, float, float] | None]]
) -> list[RankedRule]:
    """Every rule on the records, the nearest to the oracle first; `settings` by method and kind.

    A kind is left out that some record could not be tuned for, or does not hold the series of.
    """
    made: dict[str, list[Strategy]] = {"Baseline": [strategies.baseline(record) for record in records]}
    told = {"Baseline": "its own cap"}
    for scaled in (False, True):
        presets = [strategies.paper_dvar(record, scaled) for record in records]
        made[presets[0].name], told[presets[0].name] = presets, "the paper's"
    for kind in KINDS:
        chosen = [settings[record.method][kind.name] for record in records]
        found = [kind.way(one, strategies.cap(record)) for one, record in zip(chosen, records, strict=True) if one]
        if len(found) == len(records) and all(map(strategies.readable, [way.rule for way in found], records)):
            made[kind.name], told[kind.name] = found, _setting(kind, chosen)
    read = [_read(record, tuple(of)) for record, *of in zip(records, *made.values(), strict=True)]
    judged = [_oracle(records), _random(records)]
    judged += [_judged(name, told[name], records, [of[place] for of in read]) for place, name in enumerate(made)]
    return sorted(judged, key=lambda one: float(np.mean(one.errors)))


@cache
def _read(record: RecordedRun, made: tuple[Strategy, ...]) -> list[StopResult]:
    readings = strategies.read_all(made, record)
    return [readings[way] for way in made]


def _judged(name: str, setting: str, records: Sequence[RecordedRun], readings: Sequence[StopResult]) -> RankedRule:
    pairs = list(zip(records, readings, strict=True))
    outcomes = tuple(outcome(record, reading.kept, reading.censored) for record, reading in pairs)
    # Forward passes spent on deciding alone.
    cost = [
        strategies.forward_equivalents(StopResult(0, 0, False, reading.forwards, reading.pictures), record.config)
        for record, reading in pairs
    ]
    stops = tuple(float(reading.stop) for reading in readings)
    return RankedRule(name, setting, tuple(records), outcomes, float(np.mean(cost)), stops)


def _oracle(records: Sequence[RecordedRun]) -> RankedRule:
    """The oracle found on one half of the pictures and judged on the other: what no rule can be expected to beat."""
    steps = tuple(LearningCurve.of(record, CHOOSE).reached() for record in records)
    outcomes = tuple(outcome(record, step) for record, step in zip(records, steps, strict=True))
    return RankedRule(ORACLE_NAME, f"q ≥ {ORACLE}", tuple(records), outcomes, float("nan"), steps)


def _random(records: Sequence[RecordedRun]) -> RankedRule:
    """A step drawn evenly up to Baseline's cap, several times a record."""
    random, each = np.random.default_rng(0), [record for record in records for _ in range(RANDOM_DRAWS)]
    stops = [int(random.integers(1, min(strategies.cap(record), record.cap) + 1)) for record in each]
    outcomes = tuple(outcome(record, step) for record, step in zip(each, stops, strict=True))
    return RankedRule("Random step", "uniform to Baseline's cap", tuple(each), outcomes, 0.0, tuple(map(float, stops)))


def _setting(kind: StrategyFamily, chosen: Sequence[tuple[float, float, float] | None]) -> str:
    """A setting, its window as a share of the cap; those of several methods stand in their own tables."""
    told = dict.fromkeys(
        f"{100 * share:g} %" + (f", {threshold:g}" if len(kind.thresholds) > 1 else "")
        for share, threshold, _ in (one for one in chosen if one)
    )
    return "; ".join(told) if len(told) == 1 else "by method, below"


def _difference(one: RankedRule, other: RankedRule) -> Estimate:
    """How much further from the oracle than the other, paired by concept."""
    means, others = _by_concept(one), _by_concept(other)
    return interval([means[name] - others[name] for name in means])


def _by_concept(one: RankedRule) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for record, error in zip(one.records, one.errors, strict=True):
        found.setdefault(record.concept, []).append(error)
    return {name: float(np.mean(errors)) for name, errors in found.items()}


def _figures(one: RankedRule, control: RankedRule | None) -> dict[str, Any]:
    distances = [outcome_.distance for outcome_ in one.outcomes]
    low, middle, high = np.percentile(distances, (10, 50, 90))
    return {
        "rule": one.rule,
        "setting": one.setting,
        "error": over_concepts(one.records, one.errors),
        "against control": _difference(one, control) if control and control is not one else None,
        "median": float(middle),
        "low": float(low),
        "high": float(high),
        "gain kept": over_concepts(one.records, [outcome_.gain_kept for outcome_ in one.outcomes]),
        "context lost": over_concepts(one.records, [outcome_.context_lost for outcome_ in one.outcomes]),
        "premature": float(np.mean([outcome_.premature for outcome_ in one.outcomes])),
        "wasteful": float(np.mean([outcome_.wasteful for outcome_ in one.outcomes])),
        "censored": float(np.mean([outcome_.censored for outcome_ in one.outcomes])),
        "steps": float(np.mean(one.stops)),
        "cost": one.cost,
    }


def _table(name: str, how: str, found: Sequence[RankedRule]) -> Table:
    records = found[0].records if found[0].rule != "Random step" else found[1].records
    control = next((one for one in found if one.rule == CONTROL), None)
    data = [_figures(one, control) for one in found]
    lines = []
    for one in data:
        against = one["against control"]
        lines.append(
            (
                one["rule"],
                one["setting"],
                _shown(one["error"]),
                _shown(against) if against else "–",
                f"{number(one['median'], 2)} ({number(one['low'], 2)} … {number(one['high'], 2)})",
                _shown(one["gain kept"]),
                number(one["context lost"].mean, 3),
                " · ".join(f"{100 * one[share]:.0f}" for share in ("premature", "wasteful", "censored")),
                f"{one['steps']:.0f}",
                number(one["cost"] / 1000, 1),
            )
        )
    columns = (
        "Rule",
        "Setting",
        "Octaves from the oracle",
        f"Against {CONTROL.lower()}",
        "log₂(stop / oracle), median (10–90 %)",
        "Gain kept",
        "Context lost",
        "Premature · wasteful · censored, %",
        "Steps",
        "Thousand forwards to decide",
    )
    caption = (
        f"{how[0].upper() + how[1:]}; {len(records)} runs, ranked by how far the stop lies from the oracle, the first "
        f"step with {100 * ORACLE:.0f} % of the gain in Train CLIP image. In brackets: 95 % interval from resampling "
        f"concepts; differences are paired by concept, below 0 is better. Premature: less than {100 * PREMATURE:.0f} % "
        "of the gain; wasteful: more than twice the oracle; censored runs count with the record's last step. Settings "
        "are windows as shares of Baseline's cap and thresholds, tuned on the tuning concepts, 100 points each. "
        f"{Provenance.of(records)}"
    )
    bold = frozenset({(0, 2)}) if found[0].rule != ORACLE_NAME else frozenset({(1, 2)})
    return Table(name, caption, columns, tuple(lines), tuple(data), bold)


def _shown(found: Estimate) -> str:
    if not np.isfinite(found.mean):
        return "–"
    if not np.isfinite(found.low):
        return number(found.mean, 2)
    return f"{number(found.mean, 2)} [{number(found.low, 2)}, {number(found.high, 2)}]"


def _plot(name: str, how: str, found: Sequence[RankedRule]) -> Plot:
    records = found[0].records if found[0].rule != "Random step" else found[1].records
    drawn, panels = axes(1, 1, width=8.0, height=0.3 * len(found) + 0.3)
    panel = panels[0][0]
    for place, one in enumerate(found):
        distances = [outcome_.distance for outcome_ in one.outcomes]
        low, middle, high = np.percentile(distances, (10, 50, 90))
        colour = SIGNAL if one.rule.startswith("DVAR") else INK if one.rule not in _CONTROLS else NOISE
        panel.plot([low, high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
        panel.plot([middle], [place], "o", color=colour, markersize=5)
    panel.axvline(0, color=SOFT, linewidth=0.8)
    panel.set_yticks(range(len(found)), [one.rule for one in found])
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("octaves from the oracle: too early to the left, too late to the right")
    caption = (
        f"{how[0].upper() + how[1:]}: median and 10–90 % range over {len(records)} runs of log2(stop / oracle), the "
        f"nearest to the oracle above. Grey: the oracle and controls. {Provenance.of(records)}"
    )
    data = [{"rule": one.rule, "distances": [outcome_.distance for outcome_ in one.outcomes]} for one in found]
    return Plot(name, caption, drawn, data)


_CONTROLS = frozenset({ORACLE_NAME, "Random step", "Baseline", CONTROL})


def _ceiling(records: Sequence[RecordedRun]) -> str:
    agreements = []
    for share in (ORACLE, *OTHER_SHARES):
        pairs = [(LearningCurve.of(r, CHOOSE).reached(share), LearningCurve.of(r).reached(share)) for r in records]
        apart = [abs(float(np.log2(max(one, 1.0) / max(other, 1.0)))) for one, other in pairs]
        agreements.append(f"{np.mean(apart):.2f} octaves at q ≥ {share}")
    pictures = half(records[0], "train", "clip_image", CHOOSE)[1].shape[1]
    return (
        "The oracle of a run is the first step with a share q of its gain in Train CLIP image; distances are in "
        f"octaves, factors of two in steps. Two oracles, each from its own {pictures} pictures of the same run, "
        f"lie apart by {', '.join(agreements)}: no rule can be seen to do better than that."
    )


def _kept_out(gates: Mapping[str, Eligibility | None]) -> list[str]:
    """A sentence for each method that rules are not ranked on, and one for those that nobody could judge."""
    said = [
        f"{title(method)} does not pass the gate, so that rules are not ranked on it: {'; '.join(gate.failed)}."
        for method, gate in gates.items()
        if gate and gate.failed
    ]
    unknown = [title(method) for method, gate in gates.items() if not gate]
    if unknown:
        said.append(f"Fewer than {ENOUGH} tuning runs: {', '.join(unknown)} could not be put to the gate.")
    return said


def _gates(gates: Mapping[str, Eligibility | None], ranked: Sequence[RecordedRun]) -> Table:
    lines = []
    for method, gate in gates.items():
        figures = ["–"] * 7
        if gate:
            ceiling = f" of {number(gate.ceiling, 2)}" if np.isfinite(gate.ceiling) else ""
            figures = [
                f"{gate.runs}",
                f"{gate.cap}",
                f"{number(gate.start, 2)} → {number(gate.end, 2)}{ceiling}",
                number(gate.errors, 1),
                f"{100 * gate.way:.0f} %" if np.isfinite(gate.way) else "–",
                f"{100 * gate.early:.0f} %",
                number(gate.jitters, 0),
            ]
        lines.append((title(method), *figures, "not judged" if not gate else "no" if gate.failed else "yes"))
    columns = (
        *("Method", "Runs", "Cap", "Score, start → end", "Gain, standard errors", "Way to the ceiling"),
        *("Of the gain by half the cap", "Fall of L_det over its jitter", "Rules are ranked"),
    )
    caption = (
        "The gate: rules can be told apart only where a method learns, early, and L_det sees it. Runs of the tuning "
        f"concepts up to Baseline's cap; the score is the judge's identity, or else Train CLIP image. Bars: {ERRORS:g} "
        f"standard errors, {100 * WAY:.0f} % of the way where the ceiling is known, {100 * EARLY:.0f} % of the gain by "
        f"half of the cap, {JITTERS:g} jitters. What was ranked: {Provenance.of(ranked)}"
    )
    return Table(
        "gate",
        caption,
        columns,
        tuple(lines),
        tuple({"method": m, **(asdict(g) if g else {})} for m, g in gates.items()),
    )


def _skipped(shelf: RecordingArchive, methods: Sequence[str], unlearned: int) -> tuple[str, ...]:
    said = []
    if unlearned:
        said.append(f"{unlearned} runs gained less than three standard deviations of their scores, and are left out.")
    bare = [title(method) for method in methods if not shelf.for_tuning(method)]
    if bare:
        said.append(f"No tuning concept was recorded for {', '.join(bare)}: tuned rules are left out there.")
    return tuple(said)


def _told(how: str, found: Sequence[RankedRule]) -> tuple[str, ...]:
    by_name = {one.rule: one for one in found}
    if CONTROL not in by_name or "DVAR" not in by_name:
        return ()
    difference = _difference(by_name["DVAR"], by_name[CONTROL])
    better = "nearer to" if difference.mean < 0 else "further from"
    sure = "" if difference.high < 0 or difference.low > 0 else ", a difference that may be chance"
    apart = f"{abs(difference.mean):.2f} octaves {better} the oracle"
    return (f"With {how}, DVAR stops {apart} than one number of steps, tuned alike ({_shown(difference)}){sure}.",)
