"""Measure the time of one judgement of each rule: ``python benchmarks/judge.py [--steps 6100]``."""

# Prints, for each rule, the time of one judgement at the end of a long trace, without its explanation, and of all
# judgements when the run is judged at every step: processor time, the minimum of several rounds, since another process
# can only slow one down.  Each is also a multiple of the time NumPy takes for the two variances of Figure 3, measured
# in turn with it: a ratio that a busy machine hardly changes.  The rules never stop here: an explanation is computed
# once, on a stop.  The last lines are the other costs of a loop: a record, and an explanation.

import argparse
import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from dvar.stopping.rules import AtMost, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import Trace

NEVER = 1e-12
"""A threshold that no curve here reaches."""
RULES: dict[str, Rule] = {
    "Dvar": Dvar(310, NEVER),
    "Dvar, strict_paper": Dvar(310, NEVER, strict_paper=True),
    "Dvar, metric='eval/first'": Dvar(310, NEVER, metric="eval/first"),
    "EmaPercentile": EmaPercentile(310, NEVER),
    "Hall": Hall(310, NEVER),
    "Trend": Trend(310, NEVER),
    "Trend, metric='eval/first'": Trend(310, NEVER, metric="eval/first"),
    "Plateau": Plateau("eval", 310),
    "Plateau, min_delta=0.01": Plateau("eval", 310, 0.01),
    "Plateau, metric='clip_image'": Plateau("clip_image", 10_000, 0.02, "max"),
    "FixedSteps": FixedSteps(10_000),
    "AtMost(Dvar)": AtMost(Dvar(310, NEVER), 10_000),
}


def generate_records(steps: int, samples: int = 8) -> list[dict[str, object]]:
    """Return the records of a loss that falls until the end, with realistic noise."""
    noise = np.random.default_rng(0).normal(0, 1e-4, (steps + 1, samples))
    height = np.linspace(0.5, 1.5, samples)
    records: list[dict[str, object]] = []
    for step in range(steps + 1):
        records.append({"step": step, "eval": height * (0.1 + 0.1 * math.exp(-step / steps)) + noise[step]})
        if step % 50 == 0:
            records[-1]["clip_image"] = 0.6 + 0.2 * step / steps
    return records


def compute_variances(trace: Trace) -> tuple[float, float]:
    """Return both variances of Figure 3, the unit of the comparison."""
    losses = trace.values
    return losses[-310:].var(), losses.var()


def measure_minimum(rounds: int, *measurements: Callable[[], float]) -> list[float]:
    """Return the minimum of each measurement over rounds; they take turns, so that all see the same load."""
    return [min(times) for times in zip(*([measure() for measure in measurements] for _ in range(rounds)), strict=True)]


def time_judgement(rule: Callable[[Trace], object], trace: Trace, times: int = 100) -> float:
    """Return the seconds of one judgement."""
    rule(trace)
    start = time.process_time()
    for _ in range(times):
        rule(trace)
    return (time.process_time() - start) / times


def time_judgements(rule: Callable[[Trace], object], records: Iterable[dict[str, object]]) -> float:
    """Return the seconds of all judgements of a run, without those of recording."""
    trace, seconds = Trace(), 0.0
    for record in records:
        trace.record(**record)
        start = time.process_time()
        rule(trace)
        seconds += time.process_time() - start
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    records, trace = generate_records(arguments.steps), Trace()
    start = time.process_time()
    for record in records:
        trace.record(**record)
    record_seconds = (time.process_time() - start) / len(records)
    print(f"{'':<32}{'one judgement':>24}{'a complete run':>22}")
    for name, rule in RULES.items():
        judges = (rule, compute_variances)
        seconds, yardstick = measure_minimum(
            4 * arguments.rounds, *(lambda rule=rule: time_judgement(rule, trace) for rule in judges)
        )
        run_seconds, run_yardstick = measure_minimum(
            arguments.rounds, *(lambda rule=rule: time_judgements(rule, records) for rule in judges)
        )
        step_ratio, run_ratio = seconds / yardstick, run_seconds / run_yardstick
        print(f"{name:<32}{1e6 * seconds:>13.1f} µs = {step_ratio:>4.1f} x{run_seconds:>11.2f} s = {run_ratio:>4.1f} x")
    verdict = Dvar(310, NEVER)(trace)
    (explanation_seconds,) = measure_minimum(
        arguments.rounds, lambda: time_judgement(lambda _: verdict.diagnoses, trace)
    )
    print(f"{'its explanation':<32}{1e6 * explanation_seconds:>13.1f} µs")
    print(f"{'Trace.record, 8 samples':<32}{1e6 * record_seconds:>13.1f} µs")


if __name__ == "__main__":
    main()
