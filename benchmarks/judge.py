"""What a judgement costs: ``python benchmarks/judge.py [--steps 6100]``.

Prints, for each rule, the time of one judgement at the end of a long trace, without its explanation, and of all
judgements when the run is judged at every step: processor time, the best of several rounds, since another process can
only slow one down.  Each is also given as a multiple of what NumPy alone takes for the two variances of Figure 3,
measured in turn with it: a ratio that a busy machine hardly moves.  The rules' conditions never hold here: an
explanation is worked out once, on a stop.  The last lines are what else a loop pays for: a record, and an explanation.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable

import numpy as np

from dvar.stopping.rules import AtMost, Dvar, EmaPercentile, FixedSteps, Hall, Plateau, Rule, Trend
from dvar.stopping.trace import Trace

NEVER = 1e-12
"""A threshold that nothing here falls below."""
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


def records(steps: int, samples: int = 8) -> list[dict[str, object]]:
    """A loss that falls for the whole run, with the jitter of a real one."""
    noise = np.random.default_rng(0).normal(0, 1e-4, (steps + 1, samples))
    height = np.linspace(0.5, 1.5, samples)
    records: list[dict[str, object]] = []
    for step in range(steps + 1):
        records.append({"step": step, "eval": height * (0.1 + 0.1 * math.exp(-step / steps)) + noise[step]})
        if step % 50 == 0:
            records[-1]["clip_image"] = 0.6 + 0.2 * step / steps
    return records


def figure_3(trace: Trace) -> tuple[float, float]:
    """Both variances of the paper as its figure writes them: the yardstick."""
    losses = trace.values
    return losses[-310:].var(), losses.var()


def best(rounds: int, *works: Callable[[], float]) -> list[float]:
    """The least of each of the works, done in turn so that all of them meet the same machine."""
    return [min(times) for times in zip(*([work() for work in works] for _ in range(rounds)), strict=True)]


def at_the_end(rule: Callable[[Trace], object], trace: Trace, times: int = 100) -> float:
    """Seconds of one judgement."""
    rule(trace)
    began = time.process_time()
    for _ in range(times):
        rule(trace)
    return (time.process_time() - began) / times


def at_every_step(rule: Callable[[Trace], object], rows: Iterable[dict[str, object]]) -> float:
    """Seconds of all judgements of a run, without what recording takes."""
    trace, spent = Trace(), 0.0
    for row in rows:
        trace.record(**row)
        began = time.process_time()
        rule(trace)
        spent += time.process_time() - began
    return spent


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=6100)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    rows, trace = records(chosen.steps), Trace()
    began = time.process_time()
    for row in rows:
        trace.record(**row)
    recorded = (time.process_time() - began) / len(rows)
    print(f"{'':<32}{'one judgement':>24}{'a whole run':>22}")
    for name, rule in RULES.items():
        both = (rule, figure_3)
        one, yard = best(4 * chosen.rounds, *(lambda rule=rule: at_the_end(rule, trace) for rule in both))
        whole, yards = best(chosen.rounds, *(lambda rule=rule: at_every_step(rule, rows) for rule in both))
        print(f"{name:<32}{1e6 * one:>13.1f} µs = {one / yard:>4.1f} x{whole:>11.2f} s = {whole / yards:>4.1f} x")
    verdict = Dvar(310, NEVER)(trace)
    (explained,) = best(chosen.rounds, lambda: at_the_end(lambda _: verdict.diagnoses, trace))
    print(f"{'its explanation':<32}{1e6 * explained:>13.1f} µs")
    print(f"{'Trace.record, 8 samples':<32}{1e6 * recorded:>13.1f} µs")


if __name__ == "__main__":
    main()
