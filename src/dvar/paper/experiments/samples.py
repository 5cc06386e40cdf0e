"""Figure 12: images of the model where DVAR ends the training, next to those where Baseline does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from PIL import Image

from dvar.analysis.strategy_costs import CostRow, best_dvar, cost_rows
from dvar.errors import RefusedInput
from dvar.files import regular_file
from dvar.paper.result import ExperimentResult, Plot, Provenance, method_title
from dvar.paper.style import INK, SOFT, axes
from dvar.recordings.archive import RecordingArchive
from dvar.recordings.recorded_run import RecordedRun
from dvar.recordings.restore import RESCORED_SHEETS, SHEETS, read_sheet, sheet_path
from dvar.training.run_layout import REFERENCES

SHOWN = 4
"""Concepts of each method."""
EACH = 2
"""Images of training prompts, and as many of validation prompts."""


@dataclass(frozen=True)
class ShownImages:
    """The images that stand for a strategy on a run.

    Args:
        kept_step: The step that the strategy keeps.
        step: The step of the images.
        sheet: The file with the images.
    """

    kept_step: int
    step: int
    sheet: Path

    @property
    def octaves(self) -> float:
        """Return how far the step that is shown is from the step that is kept."""
        return abs(float(np.log2((self.step + 1) / (self.kept_step + 1))))

    @property
    def fresh(self) -> bool:
        """Whether the images were generated again, on fresh seeds, at the step that is kept."""
        return self.sheet.parent.name == RESCORED_SHEETS


def figure_12(archive: RecordingArchive) -> ExperimentResult:
    """Return a figure for each method; recorded runs keep their images, and a file of traces does not."""
    plots, missing = [], []
    for method in archive.methods:
        runs = [run for run in archive.example_runs(method, len(archive)) if _sheet_steps(run)]
        if runs:
            plots.append(_plot_images(archive, method, runs[:SHOWN]))
        else:
            missing.append(f"No images of {method_title(method)} were kept.")
    if not plots:
        raise RefusedInput(
            ["no recorded run has kept its images: name a folder of recorded runs, not a file of traces"]
        )
    return ExperimentResult(tuple(missing), plots=tuple(plots))


def nearest_sheet_step(run: RecordedRun, step: int) -> int:
    """Return the step with images that is nearest to ``step``, in octaves."""
    steps = np.array(_sheet_steps(run))
    return int(steps[np.abs(np.log2((steps + 1) / (step + 1))).argmin()])


def _sheet_steps(run: RecordedRun) -> list[int]:
    """Return the steps whose images a run has kept."""
    if run.folder is None:
        return []
    return sorted(int(path.stem.removeprefix("step-")) for path in (run.folder / SHEETS).glob("step-*.png"))


def _plot_images(archive: RecordingArchive, method: str, runs: Sequence[RecordedRun]) -> Plot:
    rows = {row.strategy: row for row in cost_rows(archive, method)}
    names = (best_dvar(rows), "Baseline")
    columns = 1 + 4 * EACH
    figure, panels = axes(len(runs), columns, width=0.95 * columns, height=1.15)
    selection: list[tuple[RecordedRun, str, ShownImages]] = []
    for line, run in enumerate(runs):
        _show_image(panels[line][0], _reference_image(run))
        panels[line][0].set_ylabel("\n".join(run.concept.rsplit("_", 1)).replace("_", " "), color=INK)
        for place, (name, images) in enumerate(_select_images(run, [rows[name] for name in names]).items()):
            selection.append((run, name, images))
            train, validation = read_sheet(images.sheet)
            first = 1 + 2 * EACH * place
            for offset, image in enumerate((*train[:EACH], *validation[:EACH])):
                _show_image(panels[line][first + offset], image)
            panels[line][first].set_xlabel(f"step {images.kept_step}", loc="left", color=SOFT, fontsize=8)
    for place, name in enumerate(names):
        panels[0][1 + 2 * EACH * place].set_title(name)
    panels[0][0].set_title("reference")
    caption = (
        f"{method_title(method)}. One reference image, then for each strategy {EACH} images of training prompts and "
        f"{EACH} of validation prompts: the first prompts, with the same seeds for both. The step under the images is "
        f"the one that a strategy keeps; shown are {_describe_images([images for *_, images in selection])}. "
        f"{Provenance.of(runs)} Concepts are the first by name."
    )
    data = [
        {
            "record": run.name,
            "way": name,
            "kept": images.kept_step,
            "shown": images.step,
            "from": images.sheet.parent.name,
        }
        for run, name, images in selection
    ]
    return Plot(f"pictures-{method}", caption, figure, data)


def _select_images(run: RecordedRun, rows: Sequence[CostRow]) -> Mapping[str, ShownImages]:
    """Return the images of each strategy: those of the steps that are kept where all were generated again."""
    assert run.folder
    kept_steps = {row.strategy: row.results[row.runs.index(run)].kept_step for row in rows}
    fresh = {
        name: ShownImages(step, step, sheet_path(run.folder, step, RESCORED_SHEETS))
        for name, step in kept_steps.items()
    }
    if all(images.sheet.exists() for images in fresh.values()):
        return fresh
    nearest = {name: nearest_sheet_step(run, step) for name, step in kept_steps.items()}
    return {name: ShownImages(kept_steps[name], step, sheet_path(run.folder, step)) for name, step in nearest.items()}


def _describe_images(selection: Sequence[ShownImages]) -> str:
    if all(images.fresh for images in selection):
        return "its images on fresh seeds"
    octaves = max(images.octaves for images in selection)
    nearest = f"the images of the nearest scored step (up to {octaves:.2f} octaves away)"
    if any(images.fresh for images in selection):
        return f"its images on fresh seeds where they were generated, else {nearest}"
    return nearest


def _reference_image(run: RecordedRun) -> Image.Image | None:
    paths = sorted((run.folder / REFERENCES).glob("*.png")) if run.folder else []
    return Image.open(regular_file(paths[0])).convert("RGB") if paths else None


def _show_image(panel: Axes, image: Image.Image | None) -> None:
    panel.set(xticks=[], yticks=[])
    for side in panel.spines.values():
        side.set_visible(False)
    panel.grid(visible=False)
    if image is not None:
        panel.imshow(np.asarray(image), interpolation="nearest")
