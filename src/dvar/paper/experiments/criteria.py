"""Figure 11: what the criteria that the paper tried beside DVAR measure along training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from dvar.analysis import strategies
from dvar.analysis.stop_quality import LearningCurve
from dvar.paper.result import ExperimentResult, Plot, Provenance, Table, compared, number, title
from dvar.paper.style import COLOURS, axes
from dvar.recordings.archive import RecordedRun, RecordingArchive
from dvar.stopping.rules import Dvar, EmaPercentile, Hall, Rule, Trend
from dvar.stopping.trace import RELATIVE_LOSS, Trace

SHOWN = 5
_SMALL = 1e-12
MEASURES: Mapping[str, tuple[str, Any]] = MappingProxyType(
    {
        "EMA percentile": ("change", lambda window: EmaPercentile(window, _SMALL)),
        "Hall": ("range", lambda window: Hall(window, _SMALL)),
        "Trend": ("slope", lambda window: Trend(window, _SMALL, metric=RELATIVE_LOSS)),
        "DVAR": ("ratio", lambda window: Dvar(window, _SMALL, strict_paper=True)),
    }
)
"""The number a rule compares with its threshold, and the rule itself with one that is never met."""


def make(shelf: RecordingArchive) -> ExperimentResult:
    """Each measure on some concepts, and how far its level at the oracle's step differs between concepts."""
    method = shelf.methods[0]
    records = shelf.examples(method, len(shelf))
    window = strategies.paper_window(records[0], scaled=True)
    drawn, panels = axes(len(MEASURES), 1, width=7.5, height=1.45, sharex="col")
    data: list[dict[str, Any]] = []
    levels: dict[str, list[float]] = {name: [] for name in MEASURES}
    for (name, (metric, made)), panel in zip(MEASURES.items(), panels[:, 0], strict=True):
        for place, record in enumerate(records):
            steps, values = measured(record, made(window), metric)
            levels[name].append(_at_oracle(record, steps, values))
            if place < SHOWN:
                panel.plot(steps, values, color=COLOURS[place], linewidth=1, label=record.concept.replace("_", " "))
                data.append({"record": record.name, "measure": name, "step": steps, "value": values})
        panel.set_ylabel(name)
        if name in ("Hall", "DVAR"):
            panel.set_yscale("log")
        else:
            panel.ticklabel_format(axis="y", scilimits=(-2, 2))
    panels[-1, 0].set_xlabel("step")
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=SHOWN)
    provenance = Provenance.of(records)
    caption = (
        f"{title(method)}: the number that each criterion compares with its threshold, over the last {window} steps, "
        f"on {min(SHOWN, len(records))} concepts; Trend is a share of the first loss a step. {provenance} The "
        "paper does not say its window; this is DVAR's preset, scaled in time."
    )
    table = _table(levels, method, provenance)
    return ExperimentResult(
        "figure11",
        "Figure 11: other criteria",
        (_pattern(table),),
        (table,),
        (Plot("measures", caption, drawn, data),),
    )


def _pattern(table: Table) -> str:
    """Whether DVAR's threshold carries over between concepts best, as Appendix E says."""
    ratios = {row["measure"]: row["high"] / row["low"] for row in table.data if row["concepts"] > 1}
    if "DVAR" not in ratios:
        return "Too few concepts learned enough to say how well a threshold carries over."
    least = min(ratios, key=lambda name: ratios[name])
    others = ", ".join(f"{name} {ratio:.1f}" for name, ratio in ratios.items() if name != "DVAR")
    claim = (
        f"DVAR's level at the right step differs least between concepts (by a factor of {ratios['DVAR']:.1f}; {others})"
    )
    return compared(claim, least == "DVAR")


def measured(record: RecordedRun, rule: Rule, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The number that a rule measures after each evaluation, from where it has one."""
    trace, steps, values = Trace(), [], []
    for step, losses in zip(*record.series("eval"), strict=True):
        trace.record(int(step), losses)
        metrics = rule(trace).metrics
        if metric in metrics and metrics.get("seen", 0) >= metrics["window"]:
            steps.append(int(step))
            values.append(metrics[metric])
    return np.array(steps), np.array(values)


def _at_oracle(record: RecordedRun, steps: np.ndarray, values: np.ndarray) -> float:
    climb = LearningCurve.of(record)
    if not climb.learned or not len(steps):
        return float("nan")
    return float(np.abs(np.interp(max(climb.reached(), steps[0]), steps, values)))


def _table(levels: Mapping[str, list[float]], method: str, provenance: Provenance) -> Table:
    lines, data = [], []
    for name, found in levels.items():
        kept = np.array([level for level in found if np.isfinite(level) and level > 0])
        low, middle, high = np.percentile(kept, (10, 50, 90)) if kept.size else (np.nan,) * 3
        lines.append((name, f"{middle:.2g}", f"{low:.2g} … {high:.2g}", number(high / low, 1)))
        data.append({"measure": name, "median": middle, "low": low, "high": high, "concepts": int(kept.size)})
    caption = (
        f"{title(method)}: the size of each measure where 90 % of the gain is there (or as soon after as the window is "
        "full). The larger the ratio of its 90th to its 10th percentile over concepts, the less one threshold carries "
        f"over. {provenance}"
    )
    return Table("levels", caption, ("Measure", "Median", "10–90 %", "Ratio"), tuple(lines), tuple(data))
