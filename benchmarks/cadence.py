"""Measure how a cheaper probe changes the stop: ``python benchmarks/cadence.py record``, then ``... table``."""

# ``record`` trains past every stop on tuning concepts and evaluates, after each step, 16 held samples (the first 4 and
# 8 of them are the smaller batches) and 8 with stratified timesteps.  ``table`` thins these losses and reports where
# DVAR would have stopped, beside its stop on 8 samples at every step, and the probe's share of the time.

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
from dvar.config.methods import PAPER_METHODS
from dvar.config.presets import configure
from dvar.config.training import TrainingConfig
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


def build_config(method: str, concept: str, folder: Path) -> TrainingConfig:
    return configure(mini.training_settings(method, concept) | {"output_dir": folder}, PAPER_METHODS[method])


def record_run(method: str, concept: str, folder: Path) -> None:
    """Write the trace of a run into its folder, unless it exists."""
    if (folder / "recorded.jsonl").exists():
        return
    config = build_config(method, concept, folder)
    config = replace(
        config, threshold=1e-9, probe_every=1, eval_batch_size=16, checkpointing_steps=10**6, overwrite=True
    )
    job, _ = prepare(config)
    draws = job.draw(job.examples, "stratified", 0, 0, 8)
    strata = generator(config.seed, "stratified/strata")
    timesteps = draw_stratified_timesteps(8, len(job.schedule.alphas_cumprod), strata).to(draws.timesteps.device)
    probe = Probe(job.losses, replace(draws, timesteps=timesteps, mask=None), modules=job.backbone.modules)

    def measure_stratified(step: int, watch: Stopwatch) -> Mapping[str, Any]:
        with watch("stratified"):
            return {"stratified": float(probe().double().mean())}

    job.open(None)
    for step in job.steps(lambda: False, measure_stratified):
        if step.step % 100 == 0:
            print(folder.name, step.step, flush=True)
    job.learner.trace.write(folder / "recorded.jsonl")


def compute_curves(trace: Trace) -> dict[str, np.ndarray]:
    """Return L_det by step for each batch."""
    held_curves = {name: trace.samples[:, part].mean(axis=1) for name, part in HELD.items()}
    return {**held_curves, STRATIFIED: trace.metric("stratified")[1]}


def find_stop(curve: np.ndarray, steps: Iterable[int], rule: Dvar) -> int | None:
    """Return the step at which the rule stops when it sees only these steps."""
    trace = Trace()
    for step in steps:
        trace.record(step, [curve[step]])
        if rule(trace).stop:
            return step
    return None


def compute_rows(folder: Path) -> list[dict[str, Any]]:
    """Return a row by method, batch and cadence: the stops, compared with 8 held samples at every step."""
    rows = []
    for method in PAPER_METHODS:
        paths = sorted(folder.glob(f"{method}--*/recorded.jsonl"))
        traces = [Trace.read(path) for path in paths]
        if not traces:
            continue
        config = build_config(method, mini.TUNING[0], folder)
        rule, cap = Dvar(config.window, config.threshold), traces[0].last_step
        curves = [compute_curves(trace) for trace in traces]
        reference_stops = [find_stop(curve["8 held"], range(cap + 1), rule) for curve in curves]
        train_seconds = np.median(np.concatenate([trace.metric("seconds.train")[1] for trace in traces]))
        probe_seconds = np.median(np.concatenate([trace.metric("seconds.stratified")[1] for trace in traces]))
        for batch, count in BATCHES.items():
            for cadence in CADENCES:
                if schedule_problems(config.window, cadence, cap):
                    continue
                stops = [find_stop(curve[batch], range(0, cap + 1, cadence), rule) for curve in curves]
                pairs = [(a, b) for a, b in zip(stops, reference_stops, strict=True) if a and b]
                deviations = [a / b - 1 for a, b in pairs]
                matches = [-0.02 * b <= a - b <= max(0.02 * b, cadence) for a, b in pairs]
                matches += [
                    a == b for a, b in zip(stops, reference_stops, strict=True) if not (a and b)
                ]  # both reached the cap
                probe_share = probe_seconds * count / 8 / cadence
                rows.append(
                    {
                        "method": method,
                        "batch": batch,
                        "cadence": cadence,
                        "stops": stops,
                        "every": reference_stops,
                        "off": deviations,
                        "within": sum(matches),
                        "of": len(paths),
                        "share": probe_share / (probe_share + train_seconds),
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
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.action == "record":
        for concept in arguments.concepts:
            for method in arguments.method:
                record_run(method, concept, arguments.folder / f"{method}--{concept}")
        return
    rows = compute_rows(arguments.folder)
    for row in rows:
        deviations = " ".join(f"{100 * value:+6.1f}" for value in row["off"])
        print(f"{row['method']:<18}{row['batch']:<14}every {row['cadence']:>2}  probe {row['share']:6.1%}  "
              f"within {row['within']}/{row['of']}  stop, % off: {deviations}")  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
