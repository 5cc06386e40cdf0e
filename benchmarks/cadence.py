"""What a cheaper probe does to the stop: ``python benchmarks/cadence.py record``, then ``... table``.

``record`` trains past every stop on tuning concepts and reads, after each step, 16 held samples (the first 4 and 8 of
them are the smaller batches) and 8 whose timesteps are stratified.  ``table`` thins what was read and says where DVAR
would have stopped, beside its stop on 8 samples at every step, and what share of the time the probe then takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvar import mini
from dvar.config.presets import configure
from dvar.config.training import PAPER_METHODS, TrainingConfig
from dvar.diffusion.randomness import generator
from dvar.stopping.probe import Probe, draw_stratified_timesteps
from dvar.stopping.rules import Dvar, schedule_problems
from dvar.stopping.trace import Trace
from dvar.training.loop import Stopwatch
from dvar.training.personalise import prepare

CADENCES = (1, 2, 5, 10, 20, 40)
HELD = {"4 held": slice(0, 4), "8 held": slice(0, 8), "16 held": slice(0, 16)}
STRATIFIED = "8 stratified"
BATCHES = {**dict.fromkeys(HELD, 0), "4 held": 4, "8 held": 8, "16 held": 16, STRATIFIED: 8}


def settings(method: str, concept: str, folder: Path) -> TrainingConfig:
    return configure(mini.training_settings(method, concept) | {"output_dir": folder}, PAPER_METHODS[method])


def record(method: str, concept: str, folder: Path) -> None:
    """Leave a run's trace in its folder; one that is there is not made again."""
    if (folder / "recorded.jsonl").exists():
        return
    config = settings(method, concept, folder)
    config = replace(
        config, threshold=1e-9, probe_every=1, eval_batch_size=16, checkpointing_steps=10**6, overwrite=True
    )
    job, _ = prepare(config)
    draws = job.draw(job.examples, "stratified", 0, 0, 8)
    strata = generator(config.seed, "stratified/strata")
    timesteps = draw_stratified_timesteps(8, len(job.schedule.alphas_cumprod), strata).to(draws.timesteps.device)
    probe = Probe(job.losses, replace(draws, timesteps=timesteps, mask=None), modules=job.backbone.modules)

    def series(step: int, watch: Stopwatch) -> Mapping[str, Any]:
        with watch("stratified"):
            return {"stratified": float(probe().double().mean())}

    job.open(None)
    for step in job.steps(lambda: False, series):
        if step.step % 100 == 0:
            print(folder.name, step.step, flush=True)
    job.learner.trace.write(folder / "recorded.jsonl")


def curves(trace: Trace) -> dict[str, np.ndarray]:
    """L_det by step, for each batch."""
    held = {name: trace.samples[:, part].mean(axis=1) for name, part in HELD.items()}
    return {**held, STRATIFIED: trace.metric("stratified")[1]}


def stop(curve: np.ndarray, steps: Iterable[int], rule: Dvar) -> int | None:
    """The step at which the rule stops when it sees these steps alone."""
    trace = Trace()
    for step in steps:
        trace.record(step, [curve[step]])
        if rule(trace).stop:
            return step
    return None


def table(folder: Path) -> list[dict[str, Any]]:
    """A row for each method, batch and cadence: stops over the runs, against 8 held samples at every step."""
    rows = []
    for method in PAPER_METHODS:
        runs = sorted(folder.glob(f"{method}--*/recorded.jsonl"))
        traces = [Trace.read(path) for path in runs]
        if not traces:
            continue
        config = settings(method, mini.TUNING[0], folder)
        rule, cap = Dvar(config.window, config.threshold), traces[0].last_step
        read = [curves(trace) for trace in traces]
        every = [stop(curve["8 held"], range(cap + 1), rule) for curve in read]
        train = np.median(np.concatenate([trace.metric("seconds.train")[1] for trace in traces]))
        eight = np.median(np.concatenate([trace.metric("seconds.stratified")[1] for trace in traces]))
        for batch, count in BATCHES.items():
            for cadence in CADENCES:
                if schedule_problems(config.window, cadence, cap):
                    continue
                stops = [stop(curve[batch], range(0, cap + 1, cadence), rule) for curve in read]
                both = [(a, b) for a, b in zip(stops, every, strict=True) if a and b]
                off = [a / b - 1 for a, b in both]
                fits = [-0.02 * b <= a - b <= max(0.02 * b, cadence) for a, b in both]
                fits += [a == b for a, b in zip(stops, every, strict=True) if not (a and b)]  # both ran to the cap
                probe = eight * count / 8 / cadence
                rows.append(
                    {
                        "method": method,
                        "batch": batch,
                        "cadence": cadence,
                        "stops": stops,
                        "every": every,
                        "off": off,
                        "within": sum(fits),
                        "of": len(runs),
                        "share": probe / (probe + train),
                    }
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("record", "table"))
    parser.add_argument("--folder", type=Path, default=Path("runs/cadence"))
    parser.add_argument("--method", nargs="+", choices=list(PAPER_METHODS), default=list(PAPER_METHODS))
    parser.add_argument("--concepts", nargs="+", default=mini.TUNING)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.action == "record":
        for concept in chosen.concepts:
            for method in chosen.method:
                record(method, concept, chosen.folder / f"{method}--{concept}")
        return
    rows = table(chosen.folder)
    for row in rows:
        off = " ".join(f"{100 * value:+6.1f}" for value in row["off"])
        print(f"{row['method']:<18}{row['batch']:<14}every {row['cadence']:>2}  probe {row['share']:6.1%}  "
              f"within {row['within']}/{row['of']}  stop, % off: {off}")  # fmt: skip
    if chosen.output:
        chosen.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
