"""The page docs/verdicts.md and its pictures: ``python docs/verdicts.py`` writes them anew.

Each reason has a curve made here, judged by the real rule; the page quotes the sentence that the verdict says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dvar.runs.config import ReplayConfig
from dvar.runs.replay import ReplayOutcome, verdicts
from dvar.runs.replay_figure import picture
from dvar.stopping.diagnosis import Reason
from dvar.stopping.rules import AtMost, Dvar, Rule
from dvar.stopping.trace import Trace
from dvar.stopping.verdict import Verdict

HERE = Path(__file__).parent
CONFIG = ReplayConfig()
DVAR = Dvar(CONFIG.window, CONFIG.threshold)
NOISE = np.random.default_rng(0).normal(0, 4e-5, 2001)


def falling(step: int, pace: float = 120, gain: float = 0.004) -> float:
    return 0.043 - gain * (1 - math.exp(-step / pace)) + float(NOISE[step])


@dataclass(frozen=True)
class Case:
    """A reason: the loss by step, how long the run is watched, what it means and what to do."""

    reason: Reason
    curve: Callable[[int], float]
    means: str
    do: str
    steps: int = 1000
    rule: Rule = DVAR


CASES = (
    Case(
        Reason.STABILISED,
        falling,
        "The loss fell, and over the last window it moves by little of what it moved in all. Nothing speaks against "
        "it.",
        "Use the result. The weights of the lowest loss are kept beside the last ones.",
    ),
    Case(
        Reason.RUNNING,
        lambda step: falling(step, 350),
        "The last window still holds too much of the variance of the whole run.",
        "Nothing; training goes on.",
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
        "The number of steps you allowed is reached, and the rule has not stopped before. The loss has not settled, or "
        "its jitter is too large to show it.",
        "Look at the curve: if it still falls, raise the cap (`--max_train_steps`); if it only jitters, hold a larger "
        "batch (`--eval_batch_size`).",
        600,
        AtMost(DVAR, 600),
    ),
    Case(
        Reason.STILL_FALLING,
        lambda step: 0.043 - 4e-6 * step + float(NOISE[step]),
        "The ratio is below the threshold by arithmetic: it is on any curve that is long enough, here a straight line. "
        "The slope over the window is clear of its error, and the last quarter of the steps gave 15 % or more of the "
        "fall so far.",
        "Nothing; it does not stop. To stop all the same, as the paper's rule does: `strict_paper=True`, or name it in "
        "`stop_on`.",
    ),
    Case(
        Reason.NOT_LEARNING,
        lambda step: 0.043 + float(NOISE[step]) * (8 if 30 < step < 190 else 1),
        "The loss has settled, but no lower than it began: what fell was its jitter.",
        "Training cannot reach the loss, or hardly. Check that the probe reads the model that is trained, and the "
        "learning rate; then train again.",
    ),
    Case(
        Reason.RISING,
        lambda step: falling(step, 60) + 2.2e-6 * max(step - 150, 0),
        "The loss passed its lowest point and climbs.",
        "Take the weights of the lowest loss; lower the learning rate if it rose early.",
    ),
    Case(
        Reason.OUTLIER_DOMINATED,
        lambda step: 0.09 if step == 90 else falling(step, 1200, 0.003),
        "One value, or the first 5 % of the steps, holds over half of the variance of the run. Against such a peak "
        "everything after looks still; without it the ratio is not below the threshold.",
        "Nothing; it does not stop. If the peak is the untouched model's own value, `strict_paper=True` drops it.",
        600,
    ),
    Case(
        Reason.NO_CHANGE,
        lambda step: 0.043,
        "The loss is the same number at every evaluation, to the last digit.",
        "The probe does not read the model that is trained, or its weights are not updated. Check `modules=` and the "
        "optimizer's parameters.",
        500,
    ),
    Case(
        Reason.NON_FINITE,
        lambda step: falling(step) if step < 380 else math.nan,
        "A loss was nan or infinite. A rule stops for convergence, never for a fault, so it does not stop; a trainer "
        "should, and ours does.",
        "Go back to a checkpoint before that step; lower the learning rate, or use float32.",
        420,
    ),
    Case(
        Reason.INTERRUPTED,
        falling,
        "The run was asked to end, by Ctrl-C or by its scheduler, and saved itself. No rule says this, only "
        "the trainer.",
        "Go on with `--resume_from_checkpoint latest`; the loss continues where it was.",
        360,
    ),
)

OPENING = """# What the verdict means

<!-- written by docs/verdicts.py -->

Every verdict has a reason (`verdict.reason`), one sentence for a person (`str(verdict)`) and the numbers behind it
(`verdict.metrics`). Here is each reason, on a curve of its own with the defaults for Textual Inversion (a window of 310
steps, a threshold of 15 %) and the sentence that the rule really says there. In the pictures the window it judged is
shaded; below is the ratio of the variances, dotted the ratio of a straight line, grey where there is none yet.

| reason | stops | in short |
|---|---|---|
"""
STOP_ON = """
## Which reasons stop

A rule with a window stops for the reasons in its `stop_on`. By default these are "stabilised", "not learning" and
"rising": more steps mend none of them. "still falling" and "outlier-dominated" go on, because there the condition holds
for want of steps. "no change" and "non-finite" are faults and stop only where they are named.

```python
from dvar import Dvar, Reason

patient = Dvar(window=310, threshold=0.15, stop_on=(Reason.STABILISED,))
eager = Dvar(window=310, threshold=0.15, stop_on=(*patient.stop_on, Reason.STILL_FALLING))
guarded = Dvar(window=310, threshold=0.15, stop_on=(Reason.STABILISED, Reason.NO_CHANGE, Reason.NON_FINITE))
published = Dvar(window=310, threshold=0.15, strict_paper=True)
```

`stop_on` chooses among the reasons; it changes none. `strict_paper=True` is the published rule instead: it stops on
ratio < threshold alone, says "stabilised" when it does, and drops the value before the first step; it takes no
`stop_on`. `Plateau` knows "stabilised" and "non-finite" only; `FixedSteps` always stops, with "cap reached".
When several doubts hold, the reason is the first of "outlier-dominated", "rising", "not learning", "still falling";
`verdict.diagnoses` lists them all.

## See it on your own curve

`dvar replay LOG` judges a recorded curve again, with these reasons: a `trace.jsonl`, CSV, JSON lines, W&B's exported
history, the logs of SimpleTuner and ai-toolkit and, with `pip install 'dvar[tensorboard]'`, TensorBoard's event files.

```bash
dvar replay metrics.csv --rule all --window 310 --threshold 0.15 --output replay.html
```

It judges a loss on fixed inputs. A training loss draws its timesteps anew at every step, so that its variance says
nothing about convergence; it is refused unless `--metric` names it, and then with a warning. From W&B export the whole
history (`run.scan_history()`): `run.history()` is a sample of 500 records.
"""


def judged(case: Case) -> tuple[Trace, Verdict]:
    """The trace of the case up to where the rule stops or the watch ends, and what the rule says there."""
    whole = Trace()
    for step in range(case.steps + 1):
        whole.record(step, case.curve(step))
    verdict = next((said for said in verdicts(whole, case.rule) if said.stop), case.rule(whole))
    if case.reason is Reason.INTERRUPTED:
        verdict = replace(verdict, stop=True, reason=case.reason)
    if verdict.reason is not case.reason:
        raise AssertionError(f"the curve for {case.reason.value!r} is judged {verdict.reason.value!r}: {verdict}")
    return whole.cut(verdict.step), verdict


def pages() -> dict[Path, str]:
    """The page and every picture, by path."""
    rows, parts, drawn = [], [], {}
    for case in CASES:
        trace, verdict = judged(case)
        name = case.reason.value.replace(" ", "-")
        drawn[HERE / "verdicts" / f"{name}.svg"] = (
            picture(trace, [ReplayOutcome("dvar", verdict)], DVAR.window, DVAR.threshold) + "\n"
        )
        stops, short = "yes" if verdict.stop else "no", case.means.partition(". ")[0].rstrip(".")
        rows.append(f"| [{case.reason.value}](#{name}) | {stops} | {short}. |")
        parts.append(
            f"## {case.reason.value}\n\n> {verdict}\n\n![The loss and the ratio of a run that is {case.reason.value}]"
            f"(verdicts/{name}.svg)\n\n{case.means}\n\n**What to do:** {case.do}\n"
        )
    return {HERE / "verdicts.md": OPENING + "\n".join(rows) + "\n\n" + "\n".join(parts) + STOP_ON, **drawn}


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        print(path)
