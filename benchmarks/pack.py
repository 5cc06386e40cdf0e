"""Benchmark packs: ``python benchmarks/pack.py``; concepts an hour and memory over the number of runs in a pack."""

# The same short runs on the bundled model, as many processes at once as there are workers, each on one thread: with one
# run each, as `dvar batch` trains without packs, and with a pack of N. An update of a run, with its share of the probe,
# is timed from the first update of all runs of a process to the last: its start, the base model, samples and exports
# are the same in a pack and without. Processor time hardly depends on what else the machine does, so the concepts an
# hour are computed from it, as on cores that nobody else uses.

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

METHODS = ("textual-inversion", "dreambooth-lora")
CONCEPT_STEPS = 300
"""Updates of a concept, for concepts an hour."""


def train_runs(method: str, pack: int, steps: int, folder: Path) -> dict[str, float]:
    """Train ``pack`` runs in this process, at once, and return seconds of an update of one run, and bytes."""
    from dvar import mini
    from dvar.config.methods import PAPER_METHODS
    from dvar.config.presets import configure
    from dvar.diffusion.devices import peak_memory
    from dvar.jobs.base_models import BaseModels
    from dvar.training.loop import StepRecord
    from dvar.training.pack import personalise_many
    from dvar.training.personalise import load_base_model, personalise

    concepts, moments = list(mini.concepts()), dict[int, list[tuple[float, float]]]()
    configs = []
    for number in range(pack):
        settings = mini.training_settings(method, concepts[number])
        config = configure({**settings, "output_dir": str(folder / f"run-{number}")}, PAPER_METHODS[method])
        samples = {"num_validation_images": 1, "num_inference_steps": 1, "validation_steps": 10_000}
        configs.append(replace(config, seed=number, probe_every=2, checkpointing_steps=10_000, **samples))

    def note(record: StepRecord) -> None:
        moments.setdefault(record.step, []).append((time.process_time(), time.perf_counter()))
        if record.step == steps and len(moments[steps]) == pack:
            signal.raise_signal(signal.SIGTERM)  # which ends the runs without samples and exports

    if pack == 1:
        personalise(configs[0], [note], load=BaseModels())
    else:
        for _, end in personalise_many(configs, pack, load=BaseModels(), consumers=[note]):
            if isinstance(end, Exception):
                raise end
    first, last = moments[2][-1], moments[steps][-1]
    updates = pack * (steps - 2)
    device = load_base_model(configs[0]).device
    processor, wall = ((end - start) / updates for start, end in zip(first, last, strict=True))
    return {"processor": processor, "wall": wall, "memory": float(peak_memory(device) or 0)}


def measure(method: str, pack: int, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Return what `train_runs` returns, as the mean over processes that run at once, with their memory added up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    children = []
    for worker in range(arguments.workers):
        words = ["--child", method, str(pack), str(folder / str(worker)), "--steps", str(arguments.steps)]
        command = [sys.executable, __file__, *words]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
    rows = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    means = {name: statistics.fmean(row[name] for row in rows) for name in ("processor", "wall")}
    return {**means, "memory": sum(row["memory"] for row in rows)}


def compare(method: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each size of a pack; one of 1 is a run without a pack."""
    from dvar.stopping.trace import Trace

    rows: list[dict[str, Any]] = []
    for pack in arguments.packs:
        row = measure(method, pack, arguments, folder / str(pack))
        losses, reference = (
            Trace.read(folder / str(size) / "0" / "run-0" / "trace.jsonl").values for size in (pack, arguments.packs[0])
        )
        an_hour = arguments.workers * 3600 / (CONCEPT_STEPS * row["processor"])
        ratio = rows[0]["processor"] / row["processor"] if rows else 1.0
        difference = float(np.abs(losses / reference - 1).max())
        rows.append(
            {"method": method, "pack": pack, **row, "an_hour": an_hour, "ratio": ratio, "difference": difference}
        )
    return rows


def main() -> None:
    """Measure every size of a pack for each method, and print or write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        method, pack, folder = arguments.child
        print(json.dumps(train_runs(method, int(pack), arguments.steps, Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for method in arguments.methods for row in compare(method, arguments, Path(folder) / method)]
    facts = {"steps": arguments.steps, "workers": arguments.workers, "concept_steps": CONCEPT_STEPS}
    result = {**facts, "processor": platform.processor() or platform.machine(), "rows": rows}
    text = json.dumps(result, indent=1) + "\n"
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
