"""Measure what `dvar launch` costs between measurements: ``python benchmarks/launched_step.py [--steps N]``."""

# One script takes turns in one process: as it is, and launched with a measurement at step 0 alone. It times its own
# steps, from the 10th on, by the processor time of its thread. What the launcher adds is some microseconds, which no
# difference of two long steps could show; so the script's steps are short, and what is added is the median of the
# differences of neighbouring rounds. It is compared with a step of Textual Inversion on the bundled model, the shortest
# that anyone trains with a U-Net; at most 1 % of it is promised.

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import StableDiffusionPipeline

from dvar import mini
from dvar.launch.config import LaunchConfig
from dvar.launch.runner import run_script
from dvar.launch.session import LaunchSession

SCRIPT = """
import argparse, json, time
import torch
from accelerate import Accelerator

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--steps", type=int)
args = parser.parse_args()
torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.SiLU(), torch.nn.Linear(512, 256))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
dataset = torch.utils.data.TensorDataset(torch.randn(400, 256))
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(dataset, batch_size=8))
global_step, start = 0, 0.0
while global_step < args.steps:
    for step, batch in enumerate(loader):
        if global_step == 10:
            start = time.thread_time()
        with accelerator.accumulate(model):
            noise = torch.randn_like(batch[0])
            loss = (model(batch[0] + noise) - noise).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        global_step += 1
        if global_step >= args.steps:
            break
with open(args.output_dir + "/seconds.json", "w") as file:
    json.dump((time.thread_time() - start) / (args.steps - 10), file)
"""


def time_step(script: Path, folder: Path, steps: int, launched: bool) -> float:
    """Return the processor seconds of one step of a script."""
    folder.mkdir(parents=True)
    config = LaunchConfig(dvar_every=10 * steps, dvar_window=100 * steps)
    session = LaunchSession(config, script, {}, lambda line: None) if launched else None
    status = run_script(str(script), ["--output_dir", str(folder), "--steps", str(steps)], session)
    assert status == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    seconds: float = json.loads((folder / "seconds.json").read_text())
    return seconds


def time_bundled_step(rounds: int = 5) -> float:
    """Return the processor seconds of the forward and backward pass of the bundled U-Net on 4 samples, at best."""
    unet = StableDiffusionPipeline.from_pretrained(mini.path(), safety_checker=None).unet
    latents = torch.randn(4, unet.config.in_channels, 16, 16)
    text = torch.randn(4, 32, unet.config.cross_attention_dim, requires_grad=True)
    seconds = []
    for _ in range(rounds):
        begin = time.thread_time()
        unet(latents, torch.tensor([500] * 4), text).sample.square().mean().backward()
        seconds.append(time.thread_time() - begin)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that the thread's own time is all of it
    durations: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        for number in range(args.rounds):
            for launched in (False, True) if number % 2 else (True, False):
                place = Path(folder) / f"{number}-{launched}"
                durations[launched].append(time_step(script, place, args.steps, launched))
    added = np.array(durations[True]) - np.array(durations[False])
    low, middle, high = 1e6 * np.quantile(added, [0.25, 0.5, 0.75])
    bundled = time_bundled_step()
    print(f"plain script       {1e6 * np.median(durations[False]):8.0f} us a step")
    print(f"dvar launch adds   {middle:8.0f} us (half of {args.rounds} rounds: {low:.0f} to {high:.0f})")
    print(f"a step of 4 on the bundled U-Net is {1e3 * bundled:.0f} ms: {1e-4 * middle / bundled:.2f} % of it")


if __name__ == "__main__":
    main()
