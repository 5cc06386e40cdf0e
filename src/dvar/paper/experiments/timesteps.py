"""Table 3: how the loss at early, middle and late timesteps goes with the scores of the pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import pearsonr

from dvar.analysis.stop_quality import Estimate, over_concepts
from dvar.errors import RefusedInput
from dvar.paper.published import TABLE_3
from dvar.paper.result import ExperimentResult, Provenance, Table, compared, number, title
from dvar.recordings.archive import Part, RecordedRun, RecordingArchive

INTERVALS: tuple[tuple[str, float, float], ...] = (
    ("Begin (0–333)", 0, 1 / 3),
    ("Middle (333–666)", 1 / 3, 2 / 3),
    ("End (666–1000)", 2 / 3, 1),
    ("Full (0–1000)", 0, 1),
)
SCORES: Mapping[str, tuple[Part, str]] = {
    "Train text score": ("train", "clip_text"),
    "Validation text score": ("validation", "clip_text"),
    "Train image score": ("train", "clip_image"),
    "Validation image score": ("validation", "clip_image"),
}
_SCHEDULE = 1000


def make(shelf: RecordingArchive) -> ExperimentResult:
    """The table for every method, with first differences as control."""
    tables, says = [], []
    for method in shelf.methods:
        records = [r for r in shelf.of(method) if r.has("stratified") and _timesteps(r).size]
        if not records:
            raise RefusedInput([f"{title(method)}: no record holds stratified draws with their timesteps: record them"])
        found = {(name, where[0]): _cell(records, name, where) for name in SCORES for where in INTERVALS}
        tables.append(_table(method, records, found))
        says.append(_pattern(method, found))
    return ExperimentResult("table3", "Table 3: timesteps and scores", tuple(says), (*tables, _paper()))


def correlations(record: RecordedRun, score: str, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """The loss over the timesteps in [low, high) of the schedule and the mean score, at the scored steps."""
    steps, values = record.series("stratified")
    at = _timesteps(record) / _SCHEDULE
    inside = (at >= low) & (at < high)
    scored, pictures = record.scores(*SCORES[score])
    loss = np.interp(scored, steps, values[:, inside].mean(axis=1))
    return loss, pictures.mean(axis=1)


def _cell(records: list[RecordedRun], score: str, where: tuple[str, float, float]) -> dict[str, Any]:
    pairs = [correlations(record, score, *where[1:]) for record in records]
    levels = over_concepts(records, [_pearson(*pair) for pair in pairs])
    changes = over_concepts(records, [_pearson(np.diff(loss), np.diff(values)) for loss, values in pairs])
    loss = np.concatenate([one for one, _ in pairs])
    values = np.concatenate([one for _, one in pairs])
    pooled = pearsonr(loss, values) if np.ptp(loss) and np.ptp(values) else None
    return {
        "levels": levels,
        "changes": changes,
        "pooled": float(pooled.statistic) if pooled else float("nan"),
        "p": float(pooled.pvalue) if pooled else float("nan"),
    }


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    if len(one) < 3 or not np.ptp(one) or not np.ptp(other):
        return float("nan")
    return float(np.corrcoef(one, other)[0, 1])


def _timesteps(record: RecordedRun) -> np.ndarray:
    described = record.trace.header.get("series", {}).get("stratified", {})
    return np.array(described.get("timesteps", []), np.float64)


def _table(method: str, records: list[RecordedRun], found: Mapping[tuple[str, str], dict[str, Any]]) -> Table:
    lines, data = list[tuple[str, ...]](), []
    for kind, heading in (("levels", "Levels"), ("changes", "First differences (control)")):
        lines.append((heading,))
        for name in SCORES:
            cells = [found[name, where[0]][kind] for where in INTERVALS]
            extra = [found[name, where[0]]["pooled"] for where in INTERVALS] if kind == "levels" else []
            full = found[name, INTERVALS[-1][0]]
            told = (number(extra[-1], 2), _p(full["p"])) if extra else ("–", "–")
            lines.append((name, *(_shown(cell) for cell in cells), *told))
    for (name, interval), cell in found.items():
        flat = {
            f"{kind} {part}": getattr(cell[kind], part)
            for kind in ("levels", "changes")
            for part in ("mean", "low", "high")
        }
        data.append({"score": name, "interval": interval, **flat, "pooled": cell["pooled"], "naive p": cell["p"]})
    columns = ("", *(where[0] for where in INTERVALS), "Pooled, full", "Naive p")
    caption = (
        f"{title(method)}: Pearson correlation of L_det with each score along a run, mean over concepts with a 95 % "
        "interval from resampling concepts. Pooled: one correlation over all steps of all concepts, whose p-value "
        "takes them for independent, which they are not. Two curves that both move once and then stay correlate "
        "whatever they mean: first differences are the control, near 0 where only the common trend correlates. "
        f"{Provenance.of(records)} Deviates from the paper: 32 held draws, one from each 32nd of the schedule, and "
        "log-spaced steps."
    )
    return Table(f"correlations-{method}", caption, columns, tuple(lines), tuple(data))


def _paper() -> Table:
    lines = [(name, *(number(value, 2) for value in TABLE_3[SCORES[name]])) for name in SCORES]
    data = [
        {"score": name, **dict(zip((w[0] for w in INTERVALS), TABLE_3[SCORES[name]], strict=True))} for name in SCORES
    ]
    caption = "The paper's Table 3: Stable Diffusion 1.5, 9 concepts pooled, 1500 steps, scores every 50."
    return Table("paper", caption, ("", *(where[0] for where in INTERVALS)), tuple(lines), tuple(data))


def _shown(found: Estimate) -> str:
    return "–" if not np.isfinite(found.mean) else str(found).replace("-", "−")


def _p(value: float) -> str:
    return "–" if not np.isfinite(value) else "< 0.001" if value < 1e-3 else f"{value:.3f}"


def _pattern(method: str, found: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    means = {name: [found[name, where[0]]["levels"].mean for where in INTERVALS] for name in SCORES}
    image = all(value < 0 for name in ("Train image score", "Validation image score") for value in means[name])
    apart = max(float(np.ptp(values)) for values in means.values())
    return (
        f"{title(method)}. "
        + compared("image scores rise as L_det falls, at every interval", image)
        + " "
        + compared(f"the intervals of a row differ little (by {apart:.2f} at most; 0.14 in the paper)", apart <= 0.2)
    )
