"""The page docs/concepts/verdicts.md and its figures: ``python docs/build/verdicts.py`` writes them again."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dvar.runs.config import ReplayConfig
from dvar.runs.replay import ReplayOutcome, replay_rule
from dvar.runs.replay_figure import plot_replay
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AtMost, Dvar, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

FOLDER = Path(__file__).parents[1] / "concepts"
CONFIG = ReplayConfig()
DVAR = Dvar(CONFIG.window, CONFIG.threshold)
NOISE = np.random.default_rng(0).normal(0, 4e-5, 2001)


def falling(step: int, pace: float = 120, gain: float = 0.004) -> float:
    return 0.043 - gain * (1 - math.exp(-step / pace)) + float(NOISE[step])


# Each reason has a synthetic curve, which the real rule judges; the page quotes the sentence of its verdict.


@dataclass(frozen=True)
class Case:
    """A reason with its curve.

    Args:
        reason: The reason.
        curve: The loss at a step.
        meaning: What the reason means.
        advice: What to do.
        steps: Length of the run, unless the rule stops it.
        rule: The rule that judges.
    """

    reason: Reason
    curve: Callable[[int], float]
    meaning: str
    advice: str
    steps: int = 1000
    rule: Rule = DVAR


CASES = (
    Case(
        Reason.STABILISED,
        falling,
        "The loss has fallen, and its variance over the last window is a small share of the total. Nothing casts "
        "doubt on convergence.",
        "Use the result. The weights with the lowest loss are saved beside the last ones.",
    ),
    Case(
        Reason.RUNNING,
        lambda step: falling(step, 350),
        "The last window still has too large a share of the variance of the whole run.",
        "Nothing; training continues.",
        450,
    ),
    Case(
        Reason.WARMING_UP,
        falling,
        "Fewer steps than a window have passed, or the window holds fewer than 8 evaluations. There is no ratio yet.",
        "Wait. If it never ends, evaluate more often (`--probe_every`) or shorten the window.",
        200,
    ),
    Case(
        Reason.CAP,
        lambda step: falling(step, 600),
        "The run has reached the number of steps that you allowed, and the rule has not stopped it before. The loss "
        "has not settled, or its jitter hides it.",
        "Look at the curve. If it still falls, raise the cap and go on: `--resume_from_checkpoint latest --extend "
        "--max_train_steps N`. If it only jitters, train again with a larger held batch (`--eval_batch_size`).",
        600,
        AtMost(DVAR, 600),
    ),
    Case(
        Reason.STILL_FALLING,
        lambda step: 0.043 - 4e-6 * step + float(NOISE[step]),
        "The ratio is below the threshold, but the loss still falls: on a straight line, as here, the ratio falls "
        "below any threshold in time. The slope over the window is clear of its error, and the last quarter of the "
        "steps contributed 15 % or more of the fall so far.",
        "Nothing; the rule does not stop. To stop all the same, as the paper's rule does, pass `strict_paper=True`, or "
        "name the reason in `stop_on`.",
    ),
    Case(
        Reason.NOT_LEARNING,
        lambda step: 0.043 + float(NOISE[step]) * (8 if 30 < step < 190 else 1),
        "The loss has settled, but no lower than it began. Only its jitter became smaller.",
        "Training hardly reaches the loss, or not at all. Check that the probe measures the model that is trained, and "
        "check the learning rate; then train again.",
    ),
    Case(
        Reason.RISING,
        lambda step: falling(step, 60) + 2.2e-6 * max(step - 150, 0),
        "The loss has passed its lowest point and rises.",
        "Take the weights with the lowest loss; lower the learning rate if the loss rose early.",
    ),
    Case(
        Reason.OUTLIER_DOMINATED,
        lambda step: 0.09 if step == 90 else falling(step, 1200, 0.003),
        "One value, or the first 5 % of the steps, accounts for over half of the variance of the run. Beside such a "
        "peak everything after it looks constant; without it the ratio is not below the threshold.",
        "Nothing; the rule does not stop. If the peak is the value of the untouched model, `strict_paper=True` leaves "
        "it out.",
        600,
    ),
    Case(
        Reason.NO_CHANGE,
        lambda step: 0.043,
        "The loss is the same number at every evaluation, to the last digit.",
        "The probe does not measure the model that is trained, or its weights are not updated. Check `modules=` and "
        "the parameters of the optimizer.",
        500,
    ),
    Case(
        Reason.NON_FINITE,
        lambda step: falling(step) if step < 380 else math.nan,
        "A loss is nan or infinite. A rule stops for convergence and not for a fault, so it does not stop; a trainer "
        "should, and ours does.",
        "Return to a checkpoint before that step; lower the learning rate, or use float32.",
        420,
    ),
    Case(
        Reason.INTERRUPTED,
        falling,
        "The run was asked to end, by Ctrl-C or by its scheduler, and saved a checkpoint. Only the trainer gives this "
        "reason, no rule does.",
        "Resume with `--resume_from_checkpoint latest`; the loss continues where it was.",
        360,
    ),
)

OPENING = """# What the verdict means

<!-- written by docs/build/verdicts.py -->

Every verdict has a reason (`verdict.reason`), a sentence (`str(verdict)`) and the numbers behind it
(`verdict.metrics`). This page shows each reason on a curve, with the defaults for Textual Inversion (a window of 310
steps, a threshold of 15 %) and the sentence of the verdict there. In the figures the window is shaded; below is the
ratio of the variances, dotted the ratio of a straight line, grey where there is none yet.

| reason | stops | in short |
|---|---|---|
"""
STOP_ON = """
## Which reasons stop

A rule with a window stops for the reasons in its `stop_on`. By default these are "stabilised", "not learning" and
"rising": more steps help none of them. With "still falling" and "outlier-dominated" the run goes on, because the
condition holds too early. "no change" and "non-finite" are faults and stop only where they are named.

```python
from dvar import Dvar, Reason

patient = Dvar(window=310, threshold=0.15, stop_on=(Reason.STABILISED,))
eager = Dvar(window=310, threshold=0.15, stop_on=(*patient.stop_on, Reason.STILL_FALLING))
guarded = Dvar(window=310, threshold=0.15, stop_on=(Reason.STABILISED, Reason.NO_CHANGE, Reason.NON_FINITE))
published = Dvar(window=310, threshold=0.15, strict_paper=True)
```

`stop_on` says which reasons stop; the reason stays the same. `strict_paper=True` is the published rule instead: it
stops on ratio < threshold alone, with the reason "stabilised", and leaves out the value before the first step; it takes
no `stop_on`. `Plateau` has the reasons "stabilised" and "non-finite" only; `FixedSteps` stops with "cap reached". If
there are several doubts, the reason is the first of "outlier-dominated", "rising", "not learning", "still falling";
`verdict.diagnoses` lists all of them.

## See it on your own curve

`dvar replay LOG` judges a recorded curve again, with these reasons, and reads the logs of most trainers: [replay a
log](../guides/replay-a-log.md).
"""


def judge_case(case: Case) -> tuple[Trace, Verdict]:
    """Return the trace of a case up to where the rule stops or the run ends, and the verdict there."""
    trace = Trace()
    for step in range(case.steps + 1):
        trace.record(step, case.curve(step))
    verdict = next((verdict for verdict in replay_rule(trace, case.rule) if verdict.stop), case.rule(trace))
    if case.reason is Reason.INTERRUPTED:
        verdict = replace(verdict, stop=True, reason=case.reason)
    if verdict.reason is not case.reason:
        raise AssertionError(f"the curve for {case.reason.value!r} is judged {verdict.reason.value!r}: {verdict}")
    return trace.cut(verdict.step), verdict


def build_pages() -> dict[Path, str]:
    """Return the text of the page and of every figure, by path."""
    rows, sections, figures = [], [], {}
    for case in CASES:
        trace, verdict = judge_case(case)
        name = case.reason.value.replace(" ", "-")
        outcomes = [ReplayOutcome("dvar", verdict)]
        figures[FOLDER / "verdicts" / f"{name}.svg"] = plot_replay(trace, outcomes, DVAR.window, DVAR.threshold) + "\n"
        stops, summary = "yes" if verdict.stop else "no", re.split(r"[.:] ", case.meaning)[0].rstrip(".")
        rows.append(f"| [{case.reason.value}](#{name}) | {stops} | {summary}. |")
        sections.append(
            f"## {case.reason.value}\n\n{_wrap(str(verdict), '> ')}\n\n"
            f"![The loss and the ratio of a run whose verdict is “{case.reason.value}”](verdicts/{name}.svg)\n\n"
            f"{_wrap(case.meaning)}\n\n{_wrap(f'**What to do:** {case.advice}')}\n"
        )
    return {FOLDER / "verdicts.md": OPENING + "\n".join(rows) + "\n\n" + "\n".join(sections) + STOP_ON, **figures}


def _wrap(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, 120, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


if __name__ == "__main__":
    for path, text in build_pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path)
