"""The commands on one run or log: `dvar generate`, `export`, `report` and `replay`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, NonNegativeInt, PositiveInt

from dvar.cli.options import whole, with_flags_of
from dvar.config.training import Sampler
from dvar.errors import RefusedInput
from dvar.runs.config import ReplayConfig, replay_problems

if TYPE_CHECKING:
    from dvar.runs.replay import ReplayOutcome


PLAIN_WIDTH = 200  # of a table that goes into a file or a pipe


def generate(
    run: Path,
    /,
    *,
    prompt: str,
    num_images: Annotated[PositiveInt, Parameter(converter=whole)] = 4,
    seed: Annotated[NonNegativeInt, Parameter(converter=whole)] = 0,
    guidance_scale: NonNegativeFloat | None = None,
    num_inference_steps: Annotated[PositiveInt | None, Parameter(converter=whole)] = None,
    scheduler: Sampler | None = None,
    output: Path | None = None,
) -> int:
    """Draw pictures of a learned word.

    Parameters
    ----------
    run
        Folder of a finished run.
    prompt
        What to draw; write the learned word where the subject goes.
    num_images
        How many pictures.
    seed
        Seed of the first picture; each further one has the next.
    guidance_scale
        Classifier-free guidance; the run's own by default.
    num_inference_steps
        Denoising steps; the run's own by default.
    scheduler
        Scheduler that draws; the run's own by default.
    output
        Folder for the pictures; "generated" in the run's folder by default.
    """
    from dvar.runs.generate import draw
    from dvar.runs.run_folder import RunFolder

    drawn = draw(
        RunFolder.open(run),
        [prompt] * num_images,
        range(seed, seed + num_images),
        folder=output,
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
    )
    for drawing in drawn:
        print(drawing.path)
    return 0


def export(run: Path, /, *, merged: Path | None = None, kohya: Path | None = None) -> int:
    """Write a finished run in the forms that other software reads.

    Parameters
    ----------
    run
        Folder of a finished run.
    merged
        New folder for a whole diffusers pipeline: the base model with what was learned merged into it.
    kohya
        New file, NAME.safetensors, for the LoRA of a dreambooth-lora run under the names that ComfyUI, AUTOMATIC1111
        and kohya's scripts read.
    """
    if not (merged or kohya):
        raise RefusedInput(["export needs --merged or --kohya, got neither: name what to write"])
    from dvar.runs.export import write_kohya, write_merged

    if kohya:
        print(write_kohya(run, kohya))
    if merged:
        print(write_merged(run, merged))
    return 0


def report(run: Path, /) -> int:
    """Write the report of a run, finished or not, as one page.

    Parameters
    ----------
    run
        Folder of the run.
    """
    from dvar.runs.report import write_report

    print(write_report(run))
    return 0


@with_flags_of(ReplayConfig)
def replay(log: Path, /, **given: Any) -> int:
    """Tell when each rule would have stopped a recorded run, and why.

    Reads trace.jsonl, CSV, JSON lines, W&B's exported history, SimpleTuner's and ai-toolkit's logs.
    With dvar[tensorboard] it reads event files too.

    Parameters
    ----------
    log
        File of a curve over steps, or a folder with one.
    """
    config = ReplayConfig(**given)
    if problems := replay_problems(config):
        raise RefusedInput(problems)
    from dvar.runs.replay import replayed
    from dvar.runs.replay_figure import write_picture
    from dvar.stopping.logs.reader import read_log

    trace = read_log(log, config.metric, config.step_column)
    outcomes = replayed(trace, config)
    _print_outcomes(outcomes)
    if config.output:
        print(f"picture   {write_picture(Path(config.output), log.name, trace, outcomes, config)}")
    return 0


def _print_outcomes(outcomes: Iterable[ReplayOutcome]) -> None:
    """Print a table of the rules, wrapped to the terminal; plain lines where there is none."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rule", no_wrap=True)
    table.add_column("stops at", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, "–" if outcome.stop is None else f"{outcome.stop}", outcome.why)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)
