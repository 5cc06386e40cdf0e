"""The demo on one page: a run that stopped, the same run trained on past its stop, and its concept in new places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from dvar import mini
from dvar.html import svg_charts
from dvar.html.images import embed_image
from dvar.html.svg_charts import Scale
from dvar.html.templates import render, write_page
from dvar.runs.run_folder import RunFolder

if TYPE_CHECKING:
    from dvar.stopping.trace import Trace
    from dvar.training.loop import StepRecord

PLACES = {
    "snow": "in the snow",
    "street": "on the street",
    "sea": "by the sea",
    "grass": "on the grass",
    "forest": "in the forest",
    "desert": "in the desert",
    "beach": "on the beach",
    "night": "at night",
    "table": "on a table",
}
"""Places of the bundled models' world, in the words of their captions."""
LONGER = "past-the-stop"
PAGE = "demo.html"
MAX_COLUMNS, ROWS = 8, 3


@dataclass(frozen=True)
class Demo:
    """The results that the demo shows.

    Attributes:
        run: The run that DVAR stopped.
        longer: The same run, trained on past its stop.
        likeness: For each step with samples, the mean cosine of all pairs of a sample and an instance image, by CLIP.
        places: Place to an image of the concept there.
    """

    run: RunFolder
    longer: RunFolder
    likeness: Mapping[int, float]
    places: Mapping[str, Path]

    @property
    def stop(self) -> int:
        """The step at which DVAR stopped the run."""
        return self.run.steps

    @property
    def trace(self) -> Trace:
        """Everything measured up to the end of the longer run."""
        return self.longer.trace

    @property
    def samples(self) -> dict[int, tuple[Path, ...]]:
        """Step to its sample images, before and after the stop."""
        return {**self.longer.samples, **self.run.samples}

    @property
    def steps(self) -> list[int]:
        """The steps whose samples are shown, the stop among them."""
        steps = sorted(self.samples)
        if len(steps) <= MAX_COLUMNS:
            return steps
        evenly = {steps[int(index)] for index in np.rint(np.linspace(0, len(steps) - 1, MAX_COLUMNS - 1))}
        return sorted(evenly | {self.stop})

    @property
    def findings(self) -> dict[str, str]:
        """The findings by what shows them: training loss, held loss and likeness, in numbers of this very run."""
        losses, held = self.trace.metric("train_loss")[1], self.trace.values
        first, at_stop, last = held[0], held[self.trace.steps <= self.stop][-1], held[-1]
        start, middle, end = (self.likeness[step] for step in (min(self.likeness), self.stop, max(self.likeness)))
        before, after = (f"{100 * (value - 1):+.2g} %".replace("-", "−") for value in (at_stop / first, last / at_stop))
        likeness = f"{start:.2f} at first, {middle:.2f} at the stop"
        return {
            "training loss": f"between {losses.min():.2g} and {losses.max():.2g} from one step to the next",
            "held loss": f"{before} up to the stop, {after} after it",
            "likeness": f"{likeness}, {end:.2f} at step {max(self.likeness)}",
        }


def choose_new_places(concept: str, count: int = 4) -> list[str]:
    """Return places, in words, that the images of a bundled concept do not show; at most five are shown."""
    learned = mini.places(concept)
    return [words for name, words in PLACES.items() if name not in learned][:count]


def train_past_stop(run: RunFolder, consumers: Sequence[Callable[[StepRecord], None]] = ()) -> RunFolder:
    """Train a run that has stopped on to twice its steps, in a folder inside its own, and return that.

    The run itself stays as it is. An interruption ends the further training, and what it has done counts.

    Args:
        run: The finished run.
        consumers: Each is called with every `StepRecord`.
    """
    from dvar.diffusion.devices import float32_arithmetic
    from dvar.files import remove
    from dvar.locks import lock_folder
    from dvar.stopping.combinators import FixedSteps
    from dvar.training.checkpoint import latest_checkpoint
    from dvar.training.dataset import read_concept
    from dvar.training.methods.registry import build_method
    from dvar.training.personalise import interruption, load_base_model, train_run
    from dvar.training.requests import outcome_of
    from dvar.training.run import TrainingRun
    from dvar.training.run_layout import find_written

    folder = run.folder / LONGER
    config = replace(run.settings, output_dir=str(folder), max_train_steps=2 * run.steps)
    folder.mkdir(exist_ok=True)
    with lock_folder(folder), float32_arithmetic(config.allow_tf32):
        for path in find_written(folder):
            remove(path)
        backbone = load_base_model(config)
        method = build_method(config, backbone)
        longer = TrainingRun(folder, config, read_concept(config), (), backbone, method)
        longer.rule = FixedSteps(config.max_train_steps)
        outcome_of(train_run(longer, latest_checkpoint(run.folder), consumers, interruption), longer.answer)
    return RunFolder.open(folder)


def measure_likeness(run: RunFolder, longer: RunFolder) -> dict[int, float]:
    """Return the mean cosine of samples and instance images by the bundled CLIP, for each step with samples."""
    from PIL import Image

    from dvar.diffusion.clip import Clip
    from dvar.files import regular_file
    from dvar.training.personalise import load_base_model

    clip = Clip.bundled(load_base_model(run.settings))
    references = clip.embed_images([Image.open(regular_file(path)) for path in run.references]).T
    return {
        step: float((clip.embed_images([Image.open(regular_file(path)) for path in paths]) @ references).mean())
        for step, paths in sorted({**longer.samples, **run.samples}.items())
    }


def write_demo(demo: Demo) -> Path:
    """Write the page of the demo into the folder of its run, and return its path."""
    samples, steps = demo.samples, demo.steps
    rows = [[samples[step][row] for step in steps] for row in range(min(ROWS, *(len(samples[step]) for step in steps)))]
    page = render(
        "dvar.runs",
        "demo.html",
        demo=demo,
        rows=rows,
        image=embed_image,
        training_chart=_plot(demo, *demo.trace.metric("train_loss"), "noise", "Training loss"),
        held_chart=_plot(demo, demo.trace.steps, demo.trace.values, "signal", "L_det"),
    )
    return write_page(demo.run.folder / PAGE, page)


def _plot(demo: Demo, steps: np.ndarray, losses: np.ndarray, class_: str, label: str) -> Markup:
    """Return a chart of losses with the stop."""
    x, y = Scale(0.0, max(demo.longer.steps, 1) * 1.03), Scale.around(losses, room=0.16)
    named = class_ == "signal"
    window = svg_charts.band(x, demo.stop - demo.run.window_at(demo.stop), demo.stop, "window")
    stop = svg_charts.upright(x, demo.stop, "stop", f"stop {demo.stop}" if named else None)
    return svg_charts.panel(
        x, y, [window, stop, svg_charts.curve(x, y, steps, losses, class_)], label=label, steps=named
    )
