"""How training goes on a base model, before and after its attention was bounded: the plot of `docs/bundled-models.md`.

``python -m pretraining.smoothness keep NAME FOLDER…`` adds the held losses and gradient norms of runs to
``smoothness.json``, so that the plot can be drawn when the model they were made on is gone; ``plot`` draws it.  Runs of
the first model, ``before``, were taken from the traces that had been recorded on it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from dvar.analysis.eligibility import MAX_GRADIENT
from dvar.recordings.recorded_run import RecordedRun
from dvar.stopping.trace import Trace

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FILE = Path(__file__).with_name("smoothness.json")
PLOT = Path(__file__).parents[1] / "docs" / "bundled-models" / "smoothness.svg"
POINTS = 100
"""Kept of each curve."""
LEVELS = np.geomspace(1, 2000, 80)
"""Multiples of a run's median gradient norm, at which the share of larger ones is kept."""
COLOURS = {"before": "#c0392b", "after": "#1f6feb"}


def summarise(
    name: str, steps: NDArray[np.int64], losses: NDArray[np.float64], norms: NDArray[np.float64]
) -> dict[str, Any]:
    """Return what the plot needs of a run: its held loss over the first, and how its gradient norms are spread.

    Args:
        name: Of the run.
        steps: Of the held losses, [n].
        losses: [n].
        norms: One for each update, [m].
    """
    relative, picked = losses / losses[0], np.unique(np.linspace(0, len(steps) - 1, POINTS).round().astype(int))
    multiples = norms / np.median(norms)
    return {
        "run": name,
        "steps": steps[picked].tolist(),
        "losses": relative[picked].round(5).tolist(),
        "fall": round(float(1 - relative.min()), 5),
        "climbs": bool(relative[relative.argmin() :].max() > 1),
        "largest": round(float(multiples.max()), 2),
        "shares": [float(f"{(multiples > level).mean():.2g}") for level in LEVELS],
    }


def of_recording(run: RecordedRun, series: str = "stratified") -> dict[str, Any]:
    """Return the summary of a recorded run by one of its series of held losses."""
    steps, losses = run.series(series)
    return summarise(run.name, steps, losses.mean(axis=1), run.series("grad_norm")[1].ravel())


def of_folder(run: Path) -> dict[str, Any]:
    """Return the summary of a run's folder by its L_det."""
    trace = Trace.read(run / "trace.jsonl")
    return summarise(run.name, trace.steps, trace.values, trace.metric("grad_norm")[1])


def describe(runs: Iterable[Mapping[str, Any]]) -> str:
    """Return what the page says of these runs."""
    runs = list(runs)
    climbing, rough = sum(run["climbs"] for run in runs), sum(run["largest"] > MAX_GRADIENT for run in runs)
    largest = np.median([run["largest"] for run in runs])
    return (
        f"{len(runs)} runs: L_det climbs above its first value after its minimum in {climbing}; the largest gradient "
        f"is {largest:.0f} times the median of its run (median over runs), more than {MAX_GRADIENT:g} times in {rough}"
    )


def plot(groups: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw the held losses of each group, and the share of gradients above each multiple of the median."""
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
    for panel, (group, runs) in zip(panels, groups.items(), strict=False):
        for run in runs:
            panel.plot(run["steps"], 100 * np.array(run["losses"]), color=COLOURS[group], linewidth=0.9, alpha=0.7)
        panel.axhline(100, color="0.4", linewidth=0.8, linestyle=":")
        panel.set_title(f"{group}: held loss, % of its first value", fontsize=9)
        panel.set_xlabel("step", fontsize=9)
    low, high = zip(*(panel.get_ylim() for panel in panels[:2]), strict=True)
    for panel in panels[:2]:
        panel.set_ylim(min(low), max(high))
    for group, runs in groups.items():
        for i, run in enumerate(runs):
            shares = np.where(np.array(run["shares"]) > 0, run["shares"], np.nan)
            panels[2].plot(
                LEVELS, 100 * shares, color=COLOURS[group], linewidth=0.9, alpha=0.7, label="" if i else group
            )
    panels[2].axvline(MAX_GRADIENT, color="0.4", linewidth=0.8, linestyle=":")
    panels[2].set(xscale="log", yscale="log")
    panels[2].set_title("updates with a larger gradient, %", fontsize=9)
    panels[2].set_xlabel("gradient norm, medians of the run", fontsize=9)
    panels[2].legend(fontsize=8, frameon=False)
    for panel in panels:
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def read() -> dict[str, list[dict[str, Any]]]:
    """Return the kept runs of each group, ``before`` first."""
    groups = json.loads(FILE.read_text()) if FILE.exists() else {}
    return {group: groups[group] for group in COLOURS if group in groups}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("keep", "plot"))
    parser.add_argument("group", nargs="?", choices=tuple(COLOURS))
    parser.add_argument("folders", nargs="*", type=Path)
    chosen = parser.parse_args()
    groups = read()
    if chosen.action == "keep":
        groups[chosen.group] = [of_folder(folder) for folder in chosen.folders]
        lines = ",\n".join(
            f' "{group}": [\n' + ",\n".join(f"  {json.dumps(run)}" for run in runs) + "\n ]"
            for group, runs in groups.items()
        )
        FILE.write_text(f"{{\n{lines}\n}}\n")
    else:
        plot(groups, PLOT)
    for group, runs in groups.items():
        print(f"{group}: {describe(runs)}")


if __name__ == "__main__":
    main()
