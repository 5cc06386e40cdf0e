"""Table 1: what each way of ending a run costs and keeps; and where each way stopped, concept by concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.stop_quality import interval, score
from dvar.analysis.strategies import StopResult, Strategy
from dvar.paper.published import TABLE_1
from dvar.paper.result import ExperimentResult, Plot, Provenance, Table, compared, number, spread, title
from dvar.paper.style import COLOURS, SOFT, axes
from dvar.recordings.archive import Part, RecordedRun, RecordingArchive, RescoredRun
from dvar.stopping.rules import FixedSteps

SCORES: tuple[tuple[str, Part, str], ...] = (
    ("Train CLIP img", "train", "clip_image"),
    ("Val CLIP img", "validation", "clip_image"),
    ("Val CLIP txt", "validation", "clip_text"),
    ("Identity", "train", "identity"),
)
_LEAST = ("Iterations", "Minutes")
_DIGITS = {"Iterations": 1, "Minutes": 2, "Forwards, thousands": 1}
"""Shown after the point; of scores three."""
_NOTHING = RescoredRun(np.array([], np.int64), {})


@dataclass(frozen=True)
class CostRow:
    """One way on one method: a reading a record, in the order of the records.

    ``rescored`` holds for each what was scored anew, where the steps that all ways keep were; else it is empty.
    """

    method: str
    way: str
    records: tuple[RecordedRun, ...]
    readings: tuple[StopResult, ...]
    rescored: tuple[RescoredRun, ...] = ()

    def per_concept(self, values: Sequence[float]) -> list[float]:
        """The mean over seeds of each concept."""
        found: dict[str, list[float]] = {}
        for record, value in zip(self.records, values, strict=True):
            found.setdefault(record.concept, []).append(value)
        return [float(np.mean(of)) for of in found.values()]

    def scores(self, part: Part, metric: str) -> list[float]:
        """Of the checkpoint kept: on fresh seeds, or where there are none on the half that reports, on the line."""
        if any((part, metric) not in of.pictures for of in self.rescored or self.records):
            return []
        if self.rescored:
            pairs = zip(self.rescored, self.readings, strict=True)
            return self.per_concept([anew.mean(reading.kept, part, metric) for anew, reading in pairs])
        read = zip(self.records, self.readings, strict=True)
        return self.per_concept([score(record, reading.kept, part, metric) for record, reading in read])


@cache
def rows(shelf: RecordingArchive, method: str) -> list[CostRow]:
    """Every way of Table 1 on every record of a method.

    Few iters trains as long as CLIP-s did in the mean and at most.  CLIP-s and one row of DVAR are tuned, on the tuning
    concepts alone; without these CLIP-s has the paper's values, shortened in time, and there is no tuned row.
    """
    records = shelf.of(method)
    tuned = {kind.name: strategies.tune(kind, shelf.for_tuning(method)) for kind in (strategies.CLIP, strategies.DVAR)}
    clip, dvar = tuned["CLIP-s"], tuned["DVAR"]

    def made(record: RecordedRun) -> list[Strategy]:
        found = [
            strategies.baseline(record),
            strategies.CLIP.way(clip, strategies.cap(record)) if clip else strategies.clip_s(record),
        ]
        found += [strategies.paper_dvar(record, scaled) for scaled in (False, True)]
        return found + ([_tuned_dvar(dvar, record)] if dvar else [])

    read = [list(strategies.read_all(made(record), record).items()) for record in records]
    by_way = {way.name: tuple(of[index][1] for of in read) for index, (way, _) in enumerate(read[0])}
    stops = [reading.stop for reading in by_way["CLIP-s"]]
    for name, steps in (("mean", round(float(np.mean(stops)))), ("max", max(stops))):
        few = Strategy(f"Few iters ({name})", FixedSteps(max(1, steps)))
        by_way[few.name] = tuple(strategies.read(few, record) for record in records)
    order = ["Baseline", "CLIP-s", "Few iters (mean)", "Few iters (max)"]
    order += [name for name in by_way if name.startswith("DVAR")]
    anew = tuple(shelf.rescored.get(record.name, _NOTHING) for record in records)
    kept = [{of[place].kept for of in by_way.values()} for place in range(len(records))]
    whole = all(steps <= set(of.steps.tolist()) for steps, of in zip(kept, anew, strict=True))
    return [CostRow(method, name, records, by_way[name], anew if whole else ()) for name in order]


def selected(shelf: RecordingArchive) -> dict[RecordedRun, set[int]]:
    """The steps of each record that some way of Table 1 keeps."""
    found: dict[RecordedRun, set[int]] = {}
    for method in shelf.methods:
        for row in rows(shelf, method):
            for record, reading in zip(row.records, row.readings, strict=True):
                found.setdefault(record, set()).add(reading.kept)
    return found


def make(shelf: RecordingArchive) -> ExperimentResult:
    """Table 1 and the distribution of stopping steps."""
    found = {method: rows(shelf, method) for method in shelf.methods}
    every = [record for method in shelf.methods for record in shelf.of(method)]
    says = [line for method in shelf.methods for line in _patterns(method, found[method], shelf)]
    return ExperimentResult(
        "table1",
        "Table 1: what each way of ending a run costs and keeps",
        tuple(says) + _lost(shelf),
        (_table(shelf, found, Provenance.of(every)), _beside(shelf.methods)),
        (_strip(found, Provenance.of(every)),),
    )


def _tuned_dvar(setting: tuple[float, float, float], record: RecordedRun) -> Strategy:
    way = strategies.DVAR.way(setting, strategies.cap(record))
    return Strategy("DVAR (tuned)", way.rule)


def _figures(row: CostRow, shelf: RecordingArchive, baseline: float) -> dict[str, Any]:
    """The numbers of a row: lists hold one value a concept."""
    seconds = shelf.units(row.method)
    minutes = row.per_concept([strategies.minutes(reading, seconds) for reading in row.readings])
    pairs = list(zip(row.records, row.readings, strict=True))
    figures: dict[str, Any] = {name: row.scores(part, metric) for name, part, metric in SCORES}
    return figures | {
        "Iterations": row.per_concept([reading.stop for reading in row.readings]),
        "Minutes": minutes,
        "Speed-up": baseline / float(np.mean(minutes)) if np.mean(minutes) else float("nan"),
        "Start-up, min": seconds.get("start_up", float("nan")) / 60,
        "Final pictures, min": strategies.PICTURES * seconds.get("picture", float("nan")) / 60,
        "Forwards, thousands": row.per_concept(
            [strategies.forward_equivalents(r, of.config) / 1000 for of, r in pairs]
        ),
        "Censored": float(np.mean([reading.censored for reading in row.readings])),
    }


def _table(shelf: RecordingArchive, found: dict[str, list[CostRow]], provenance: Provenance) -> Table:
    identity = any(row.scores("train", "identity") for rows in found.values() for row in rows)
    lists = [name for name, *_ in SCORES if identity or name != "Identity"] + [*_LEAST, "Forwards, thousands"]
    lines: list[tuple[str, ...]] = []
    bold, data = set[tuple[int, int]](), []
    columns = ("Way", *lists, "Speed-up", "Start-up, min", "Final pictures, min", "Censored")
    for method, group in found.items():
        concepts = len({record.concept for record in group[0].records})
        lines.append((f"{title(method)} ({concepts} concepts)",))
        baseline = float(np.mean([strategies.minutes(r, shelf.units(method)) for r in group[0].readings]))
        figures = [_figures(row, shelf, baseline) for row in group]
        for row, values in zip(group, figures, strict=True):
            shown = [spread(values[name], _DIGITS.get(name, 3)) for name in lists]
            ends = [number(values[name], 2) for name in ("Start-up, min", "Final pictures, min")]
            lines.append(
                (row.way, *shown, f"{number(values['Speed-up'], 1)}×", *ends, f"{100 * values['Censored']:.0f} %")
            )
            flat = {f"{name} {part}": of for name in lists for part, of in _moments(values[name])}
            data.append(
                {"method": method, "way": row.way, "concepts": concepts, **flat}
                | {name: values[name] for name in columns[len(lists) + 1 :]}
            )
        first = len(lines) - len(group)
        for name in lists:
            means = [float(np.mean(values[name])) if values[name] else np.nan for values in figures]
            if np.isfinite(means).any():
                best = np.nanargmin(means) if name in (*_LEAST, "Forwards, thousands") else np.nanargmax(means)
                bold.add((first + int(best), columns.index(name)))
    if all(group[0].rescored for group in found.values()):
        provenance = replace(provenance, halves="the even half chooses")
    caption = (
        "Mean ± standard deviation over concepts (seeds averaged first); the best mean of a method is bold. Iterations "
        f"are those trained; the scores are of the checkpoint kept, {_drawn(found)}. Identity, where it stands: the "
        "bundled recogniser's probability that the subject is this one and not another of its class. Minutes are "
        "counts times median unit seconds, each way paying for its own probe and pictures, without start-up and final "
        "pictures, which stand beside. A forward is one sample through the U-Net. Censored runs had not stopped where "
        f"the record ends, and count with that step. {provenance} Deviates from the paper: all ways are read off one "
        "run, CLIP-s is measured where the record was scored, and DVAR's first evaluation is dropped as in the paper."
    )
    return Table("ways", caption, columns, tuple(lines), tuple(data), frozenset(bold))


def _drawn(found: dict[str, list[CostRow]]) -> str:
    """On which pictures the checkpoints were scored."""
    anew = [title(method) for method, group in found.items() if group[0].rescored]
    read = "on the half of its pictures that chose nothing, between scored steps on the line"
    if not anew:
        return read
    drawn = "drawn anew on as many seeds that chose nothing, for all ways alike"
    return drawn if len(anew) == len(found) else f"{drawn} ({', '.join(anew)}), else {read}"


def _moments(values: Sequence[float]) -> list[tuple[str, float]]:
    if not values:
        return []
    return [("mean", float(np.mean(values))), ("sd", float(np.std(values)))]


def _beside(methods: Sequence[str]) -> Table:
    lines, data = list[tuple[str, ...]](), []
    for method in methods:
        if method not in TABLE_1:
            continue
        lines.append((title(method),))
        for row in TABLE_1[method]:
            lines.append(
                (row.way, row.train_image, row.validation_image, row.validation_text, row.iterations, row.minutes)
            )
            data.append({"method": method, **vars(row)})
    columns = ("Way", "Train CLIP img", "Val CLIP img", "Val CLIP txt", "Iterations", "Minutes")
    caption = "The paper's Table 1: Stable Diffusion 1.5, 48 concepts, one A100. A dash is what could not be read."
    return Table("paper", caption, columns, tuple(lines), tuple(data))


def _strip(found: dict[str, list[CostRow]], provenance: Provenance) -> Plot:
    drawn, panels = axes(1, len(found), width=3.6 * len(found) + 1.2, height=2.6, sharey=True)
    data = []
    for panel, (method, group) in zip(panels[0], found.items(), strict=True):
        for place, row in enumerate(group):
            random = np.random.default_rng(place)
            for censored, shape in ((False, "o"), (True, ">")):
                steps = [reading.stop for reading in row.readings if reading.censored == censored]
                heights = place + random.uniform(-0.22, 0.22, len(steps))
                hollow = "none" if censored else COLOURS[place % len(COLOURS)]
                panel.scatter(steps, heights, s=16, marker=shape, facecolor=hollow, edgecolor=COLOURS[place], alpha=0.8)
            middle = float(np.median([reading.stop for reading in row.readings]))
            panel.plot([middle, middle], [place - 0.32, place + 0.32], color=COLOURS[place], linewidth=2)
            data += [
                {"method": method, "way": row.way, "record": record.name, "stop": r.stop, "censored": r.censored}
                for record, r in zip(row.records, row.readings, strict=True)
            ]
        panel.set_title(title(method))
        panel.set_xscale("log")
        _plain_steps(panel)
        panel.set_xlabel("step trained to")
        panel.grid(axis="y", visible=False)
    names = list(dict.fromkeys(row.way for group in found.values() for row in group))
    panels[0][0].set_yticks(range(len(names)), names, color=SOFT)
    panels[0][0].invert_yaxis()
    caption = (
        "Where each way stopped: a dot is a run, the bar the median; a hollow triangle is a run that had not stopped "
        f"where its record ends. {provenance}"
    )
    return Plot("stops", caption, drawn, data)


def _plain_steps(panel: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = panel.get_xlim()
    digits = (1, 2, 5) if high > 8 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ticks = [digit * 10**power for power in range(6) for digit in digits if low <= digit * 10**power <= high]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:g}"))


def _patterns(method: str, group: list[CostRow], shelf: RecordingArchive) -> list[str]:
    rows = {row.way: row for row in group}
    dvar = next(name for name in ("DVAR (tuned)", "DVAR (preset scaled in time)") if name in rows)

    def told(higher: str, lower: str, part: Part, metric: str) -> tuple[str, bool]:
        """Both means, their paired difference with its interval over concepts, and whether it is above 0."""
        ours, theirs = (np.array(rows[way].scores(part, metric) or [np.nan]) for way in (higher, lower))
        apart = interval(ours - theirs)
        paired = f"{number(apart.mean)} [{number(apart.low)}, {number(apart.high)}]"
        return f"({np.mean(ours):.3f} against {np.mean(theirs):.3f}; paired by concept {paired})", apart.mean > 0

    def cost(way: str) -> float:
        return float(np.mean([strategies.minutes(reading, shelf.units(method)) for reading in rows[way].readings]))

    name = title(method)
    image, image_holds = told("Baseline", dvar, "train", "clip_image")
    text, text_holds = told(dvar, "Baseline", "validation", "clip_text")
    return [
        f"{name}. "
        + compared(
            f"{dvar} takes less time than Baseline ({cost(dvar):.2f} against {cost('Baseline'):.2f} minutes)",
            cost(dvar) < cost("Baseline"),
        )
        + " "
        + compared(f"Baseline keeps the higher Train CLIP img {image}", image_holds)
        + " "
        + compared(f"DVAR keeps the higher Val CLIP txt {text}", text_holds)
    ]


def _lost(shelf: RecordingArchive) -> tuple[str, ...]:
    if not shelf.lost:
        return ()
    told = "; ".join(f"{name}: {reason}" for name, reason in sorted(shelf.lost.items()))
    return (f"Runs that failed or could not be read, and that no row counts: {told}.",)
