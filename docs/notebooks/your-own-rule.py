# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A rule of your own, on the public runs
#
# The repository has recorded runs of its bundled model, trained past every stop, with the scores of the images at each
# stage. A new stopping rule can be tried on them in minutes, without a GPU and without training anything.

# %%
REPOSITORY = "ADDRESS"  # of the repository that this notebook comes from, as git clone takes it

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dvar") is None:
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, "dvar-repository"], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--editable", "dvar-repository[train,lab]"]
    subprocess.run(command, check=True)
    sys.path.insert(0, "dvar-repository/src")  # for this session, which began before the installation

# %% [markdown]
# ## The runs

# %%
from pathlib import Path

import dvar
from dvar.analysis.stop_quality import LearningCurve
from dvar.recordings.archive_file import read_traces

archive = read_traces(Path(dvar.__file__).parents[2] / "docs" / "traces.npz")  # in a clone of the repository
runs = [run for run in archive if run.method == "dreambooth-lora" and LearningCurve.of_run(run).learned]
tuning = [run for run in runs if run.concept in archive.tuning_concepts]
test = [run for run in runs if run.concept not in archive.tuning_concepts]
print(f"{len(tuning)} runs to choose settings on, {len(test)} to rank rules on")

# %% [markdown]
# One of them: the loss on the held batch, and the likeness of generated images to the training images. The *oracle* is
# the first step with 90 % of the gain in likeness. A good rule stops there.

# %%
import matplotlib.pyplot as plt

run = test[0]
curve = LearningCurve.of_run(run)
steps, losses = run.series("eval")
_, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(8, 4), layout="constrained")
upper.plot(steps, losses.mean(axis=1), color="tab:red")
upper.set_ylabel("held loss")
lower.plot(curve.steps, curve.values, "o-", color="0.3")
lower.set(xlabel="step", ylabel="likeness")
for axes in (upper, lower):
    axes.axvline(curve.step_at(), color="tab:green", linestyle="--")
print(f"{run.name}: the oracle is at step {curve.step_at():.0f}")
plt.show()

# %% [markdown]
# ## A rule
#
# A rule is called with a `dvar.Trace` at every record and returns a `dvar.Verdict`; it sees nothing of later steps.
# This one fits a straight line through the last `window` steps and stops when the line falls by less than `share` of
# what the loss has fallen by since the start. Change it, or write another.

# %%
from dataclasses import dataclass

import numpy as np
from dvar import Reason, Trace, Verdict


@dataclass(frozen=True)
class Slope:
    """Stop when the last `window` steps brought less than `share` of the fall so far."""

    window: int = 100
    share: float = 0.1

    def __call__(self, trace: Trace) -> Verdict:
        steps, values = trace.steps, trace.values
        recent, step = steps > steps[-1] - self.window, int(steps[-1])
        if step - steps[0] < self.window:
            return Verdict(False, Reason.WARMING_UP, step, "slope", {})
        slope = np.polyfit(steps[recent], values[recent], 1)[0]
        fall = values[0] - values[recent].mean()
        stop = bool(fall > 0 and -slope * self.window < self.share * fall)
        return Verdict(stop, Reason.STABILISED if stop else Reason.RUNNING, step, "slope", {"slope": float(slope)})


# %% [markdown]
# ## Choose its settings
#
# On the tuning concepts alone: the setting whose stops are nearest to the oracle, in octaves (factors of two).

# %%
from dvar.analysis.stop_quality import assess_stop
from dvar.analysis.strategies import Strategy, evaluate_strategies


def measure(rules, runs):
    """Return by rule how far its stop is from the oracle, and the share of the gain that it has, on each run."""
    table = {rule: [] for rule in rules}
    for run in runs:
        results = evaluate_strategies([Strategy(repr(rule), rule) for rule in rules], run)
        for strategy, result in results.items():
            quality = assess_stop(run, result.stop, result.censored, kept_step=result.kept_step)
            table[strategy.rule].append((abs(quality.distance), quality.gain_kept, result.stop))
    return {rule: np.mean(rows, axis=0) for rule, rows in table.items()}


grid = [Slope(window, share) for window in (50, 100, 150) for share in (0.05, 0.1, 0.2)]
tuned = measure(grid, tuning)
best = min(tuned, key=lambda rule: tuned[rule][0])
print(f"{best}: {tuned[best][0]:.2f} octaves from the oracle on the tuning runs")

# %% [markdown]
# ## Rank it
#
# Beside DVAR and a constant number of steps, both chosen on the same tuning runs.

# %%
from dvar import Dvar, FixedSteps

rivals = {
    "DVAR": [Dvar(window, threshold) for window in (50, 100, 150) for threshold in (0.1, 0.2, 0.4)],
    "a constant": [FixedSteps(steps) for steps in (60, 90, 120, 150, 180, 240, 300)],
}
chosen = {"slope": best}
for name, rules in rivals.items():
    errors = measure(rules, tuning)
    chosen[name] = min(errors, key=lambda rule: errors[rule][0])

ranking = measure(list(chosen.values()), test)
print(f"{'rule':12}{'octaves from the oracle':>26}{'gain kept':>12}{'steps':>8}")
for name, rule in sorted(chosen.items(), key=lambda item: ranking[item[1]][0]):
    distance, gain, stop = ranking[rule]
    print(f"{name:12}{distance:26.2f}{gain:12.2f}{stop:8.0f}")

# %% [markdown]
# Differences of a few hundredths on so few runs are chance. `dvar reproduce rules --records docs/traces.npz` ranks all
# rules of the library, on every eligible method, with intervals that resample the concepts: [the
# results](../results.md#every-stopping-rule-ranked-on-recorded-runs). [Write a rule](../guides/write-a-rule.md) says how
# your package makes yours known to every command.
