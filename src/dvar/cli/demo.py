"""The command `dvar demo`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import MutableMapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dvar.cli.config import DemoConfig, problems
from dvar.cli.console import print_message, program_name
from dvar.cli.options import raise_problems, with_flags_of
from dvar.cli.train import print_result, run_training
from dvar.config.methods import TextualInversionConfig

if TYPE_CHECKING:
    from dvar.training.run import TrainingResult

MOST_THREADS = 4
"""The networks of the bundled models are small: what more threads bring was not measured."""
_MOMENT = 0.5  # seconds over which the load is measured


@with_flags_of(DemoConfig)
def demo(**flags: Any) -> int:
    """Personalise the bundled model with a bundled concept, and show on one page what the stop was worth.

    Training stops by itself, then goes on in a folder of its own to twice as many steps, for comparison.
    """
    config = DemoConfig(**flags)
    raise_problems(problems(config))
    use_free_cores(os.environ)
    chosen = [
        word
        for name in ("concept", "output_dir")
        if (value := getattr(config, name))
        for word in (f"--{name}", str(value))
    ]
    again = f"{program_name()} {shlex.join(['demo', *chosen])}"

    def finish(result: TrainingResult, prompt: str) -> int:
        status = print_result(result, prompt, again)
        return status or _compare(result, prompt.removesuffix(" on the beach"), config.concept_name)

    return run_training(config.training_settings, TextualInversionConfig, finish)


def use_free_cores(environment: MutableMapping[str, str]) -> None:
    """Let OpenMP have as many threads as cores are idle, unless the user has set how many; before torch is imported.

    Two threads beside a program that takes one of two cores train more slowly than one.
    """
    if "OMP_NUM_THREADS" in environment:
        return
    with suppress(ModuleNotFoundError):  # without it there is no torch either, as the next import says
        import psutil

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        idle = (1 - psutil.cpu_percent(_MOMENT) / 100) * (os.cpu_count() or 1)
        environment["OMP_NUM_THREADS"] = str(max(1, min(round(idle), cores, MOST_THREADS)))


def _compare(result: TrainingResult, prompt: str, concept: str) -> int:
    """Train a run on past its stop, generate its concept in new places, and print and write what can be seen."""
    from dvar.runs.demo import Demo, choose_new_places, measure_likeness, train_past_stop, write_demo
    from dvar.runs.generate import generate_images
    from dvar.runs.run_folder import RunFolder
    from dvar.training.progress import show_progress, sparkline

    run, last = RunFolder.open(result.folder), 2 * result.steps
    print_message(f"training on to step {last}, to see what the stop left out; Ctrl-C ends this part early")
    title, earlier = f"past the stop at step {result.steps}", run.trace.values.tolist()
    with show_progress(last, title, sys.stderr, earlier) as progress:
        longer = train_past_stop(run, [progress])
    places = choose_new_places(concept)
    images = generate_images(run, [f"{prompt} {place}" for place in places], range(len(places)))
    images_by_place = dict(zip(places, (image.path for image in images), strict=True))
    results = Demo(run, longer, measure_likeness(run, longer), images_by_place)
    curves = {"training loss": longer.trace.metric("train_loss")[1], "held loss": longer.trace.values}
    print()
    for name, finding in results.findings.items():
        curve = sparkline([float(loss) for loss in curves[name]], 40) if name in curves else ""
        print(f"{name:<15}{curve:<42}{finding}")
    for place, path in images_by_place.items():
        print(f"{place:<15}{path}")
    print(f"{'on one page':<15}{write_demo(results)}")
    return 0
