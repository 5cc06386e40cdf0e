"""The commands on one run or log: `dvar generate`, `export`, `report` and `replay`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dvar.cli.options import raise_problems, with_flags_of
from dvar.runs.config import ExportConfig, GenerateConfig, ReplayConfig, ReportConfig, problems

if TYPE_CHECKING:
    from dvar.runs.replay import ReplayOutcome


PLAIN_WIDTH = 200  # of a table that is written into a file or a pipe


@with_flags_of(GenerateConfig)
def generate(run: Path, /, **flags: Any) -> int:
    """Generate images of a learned word.

    Parameters
    ----------
    run
        Folder of a finished run.
    """
    config = GenerateConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.generate import generate_images
    from dvar.runs.run_folder import RunFolder

    images = generate_images(
        RunFolder.open(run),
        [str(config.prompt)] * config.num_images,
        range(config.seed, config.seed + config.num_images),
        folder=Path(config.output) if config.output else None,
        guidance_scale=config.guidance_scale,
        num_inference_steps=config.num_inference_steps,
        scheduler=config.scheduler,
    )
    for image in images:
        print(image.path)
    return 0


@with_flags_of(ExportConfig)
def export(run: Path, /, **flags: Any) -> int:
    """Write a finished run in the formats that other software reads.

    Parameters
    ----------
    run
        Folder of a finished run.
    """
    config = ExportConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.export import write_kohya_lora, write_merged_pipeline

    if config.kohya:
        print(write_kohya_lora(run, Path(config.kohya)))
    if config.merged:
        print(write_merged_pipeline(run, Path(config.merged)))
    return 0


@with_flags_of(ReportConfig)
def report(run: Path, /, **flags: Any) -> int:
    """Write the report of a run, finished or not, as one page.

    Parameters
    ----------
    run
        Folder of the run.
    """
    config = ReportConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.report import write_report

    print(write_report(run, config.output))
    return 0


@with_flags_of(ReplayConfig)
def replay(log: Path, /, **flags: Any) -> int:
    """Say when each rule would have stopped a recorded run, and why.

    Reads trace.jsonl, CSV, JSON lines, the exported history of W&B, and the logs of SimpleTuner and ai-toolkit.
    With dvar[tensorboard] it reads event files too.

    Parameters
    ----------
    log
        File of a curve over steps, or a folder that holds one.
    """
    config = ReplayConfig(**flags)
    raise_problems(problems(config))
    from dvar.runs.replay import replay_rules
    from dvar.runs.replay_figure import write_replay
    from dvar.stopping.logs.reader import read_log

    trace = read_log(log, config.metric, config.step_column)
    outcomes = replay_rules(trace, config)
    _print_outcomes(outcomes)
    if config.output:
        print(f"figure    {write_replay(Path(config.output), log.name, trace, outcomes, config)}")
    return 0


def _print_outcomes(outcomes: Iterable[ReplayOutcome]) -> None:
    """Print a table of the rules, wrapped to the width of the terminal; plain lines elsewhere."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("rule", no_wrap=True)
    table.add_column("stops at", justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for outcome in outcomes:
        table.add_row(outcome.name, "–" if outcome.stop is None else f"{outcome.stop}", outcome.sentence)
    Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)
