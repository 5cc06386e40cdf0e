"""Benchmark batches: ``python benchmarks/batch.py``; jobs an hour and the cost of the engine."""

# The same short jobs on the bundled model with one and two workers, as local processes and on a Ray cluster of this
# machine. What the engine costs is the time of a job beyond its training: finding it, copying the base model, encoding,
# the sample image and the export are part of it, and so is the start of a worker for its first job.

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvar import mini
from dvar.jobs.batch import Batch, JobEvent
from dvar.jobs.config import BatchConfig

ENGINES = {"local": None, "Ray": "auto"}


def list_jobs(count: int, steps: int) -> list[dict[str, Any]]:
    """Return tables of jobs that train so many steps each, with a probe at the cadence of the preset."""
    names = list(mini.concepts())[:count]
    return [
        {
            "id": name,
            **{key: str(value) for key, value in mini.training_settings("textual-inversion", name).items()},
            "max_train_steps": steps,
            "window": steps - 1,
            "probe_every": 2,
            "num_validation_images": 1,
            "num_inference_steps": 5,
        }
        for name in names
    ]


def summarise_events(events: Sequence[JobEvent], seconds: float) -> dict[str, float]:
    """Return jobs an hour, and the seconds of a job that are not training: of the first of each worker, and of others.

    Args:
        seconds: Seconds from the start of the command to the end of the last job.
    """
    started: dict[str, float] = {}
    first: dict[str, str] = {}
    overheads: dict[bool, list[float]] = {True: [], False: []}
    for event in events:
        if event.kind == "started":
            started[event.job] = event.time
            first.setdefault(event.worker, event.job)
        elif event.kind == "done":
            of_first = first[event.worker] == event.job
            overheads[of_first].append(event.time - started[event.job] - float(event.facts["seconds"]))
    done = sum(map(len, overheads.values()))
    return {
        "jobs": done,
        "jobs_an_hour": 3600 * done / seconds,
        "first_job": statistics.median(overheads[True]),
        "further_jobs": statistics.median(overheads[False]),
    }


def measure(engine: str, workers: int, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `summarise_events` returns of a batch, with the bytes that a run leaves."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        opened = Batch(list(tables), BatchConfig(output_dir=folder, workers=workers, ray=ENGINES[engine]))
        events = [event for event in opened.events() if event]
        seconds = time.perf_counter() - start
        runs = [path for path in Path(folder).iterdir() if (path / "result.json").exists()]
        sizes = [sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) for run in runs]
    if ENGINES[engine]:
        import ray

        ray.shutdown()  # the cluster has places for this number of workers
    row = {"engine": engine, "workers": workers, **summarise_events(events, seconds)}
    return {**row, "run_bytes": statistics.median(sizes)}


def main() -> None:
    """Measure both engines with one and two workers, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engines", nargs="+", default=list(ENGINES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    tables = list_jobs(arguments.jobs, arguments.steps)
    rows = [measure(engine, workers, tables) for engine in arguments.engines for workers in arguments.workers]
    result = {"steps": arguments.steps, "processor": platform.processor() or platform.machine(), "rows": rows}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
