# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Add it to your loop
#
# A small network learns to remove noise from points on a spiral: a diffusion model in two dimensions, which trains in
# seconds. We add six lines to a plain PyTorch loop, and it stops by itself.

# %%
REPOSITORY = "ADDRESS"  # of the repository that this notebook comes from, as git clone takes it

import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dvar") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"dvar @ git+{REPOSITORY}"], check=True)

# %% [markdown]
# ## A loop as you have one
#
# `draw` draws everything that is random about a batch: the points, the noise and its level. `losses` returns one loss
# for each sample.

# %%
import matplotlib.pyplot as plt
import torch
from torch import nn


def draw(count):
    angle = 3 * torch.pi * torch.rand(count).sqrt()
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 6
    return points, torch.randn(count, 2), torch.rand(count, 1)


def losses(batch):
    points, noise, level = batch
    noisy = (1 - level).sqrt() * points + level.sqrt() * noise
    return (network(torch.cat([noisy, level], dim=1)) - noise).square().mean(dim=1)


def update(batch_size=8):
    loss = losses(draw(batch_size)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def begin(learning_rate=1e-3):
    """Start again with a new network."""
    global network, optimizer
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate)


begin()
training_losses = [update() for _ in range(1500)]
_, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
axes.plot(training_losses, color="0.6", linewidth=0.8)
axes.set(xlabel="step", ylabel="training loss")
plt.show()

# %% [markdown]
# When was it done? The curve does not say.
#
# ## The six lines
#
# A `Probe` holds one batch, drawn once, and evaluates the loss on it. It switches dropout off meanwhile and leaves your
# random numbers alone. The `Trace` remembers, the rule judges.

# %%
import dvar

begin()
probe = dvar.Probe.capture(losses, lambda: draw(64), [network])
trace, stop = dvar.Trace(), dvar.Dvar(window=310, threshold=0.15)

for step in range(6000):
    trace.record(step, probe())
    verdict = stop(trace)
    if verdict.stop:
        break
    update()
print(verdict)

# %%
_, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
axes.plot(trace.steps, trace.values, color="tab:red")
axes.axvspan(verdict.step - stop.window, verdict.step, color="0.9")
axes.set(xlabel="step", ylabel="held loss")
plt.show()

# %% [markdown]
# The shaded part is the window. [What the verdict means](../concepts/verdicts.md) explains the sentence.
#
# ## Cheaper, and on disk
#
# A `StopMonitor` combines the three, measures only every tenth step, and writes each record to a file from which a run
# resumes. The stop hardly moves: windows are in steps at any cadence.

# %%
begin()
probe = dvar.Probe.capture(losses, lambda: draw(64), [network])
monitor = dvar.StopMonitor(dvar.Dvar(310, 0.15), probe, "run/trace.jsonl", every=10)
for step in range(6000):
    verdict = monitor(step)
    if verdict.stop:
        break
    update()
print(verdict)

# %% [markdown]
# ## When something is wrong
#
# A rule that only counts steps would train this network to the end. Here nothing is learned, because the optimizer has
# no rate, and the verdict says so.

# %%
begin(learning_rate=0.0)
probe = dvar.Probe.capture(losses, lambda: draw(64), [network])
trace = dvar.Trace()
for step in range(400):
    trace.record(step, probe())
    update()
print(stop(trace))

# %% [markdown]
# ## In your framework
#
# [Add it to your loop](../guides/add-it-to-your-loop.md) has the same lines for diffusers, kohya, accelerate,
# transformers, Lightning, Ignite, Keras, Ray Tune and Optuna, and says what else must be fixed in the batch of an image
# model.
