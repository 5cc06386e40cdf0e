"""Measure what `dvar launch` costs between measurements: ``python benchmarks/launched_step.py [--steps N]``."""

# One script takes turns in one process: as it is, and launched with a measurement at step 0 alone. It times its own
# steps, from the 10th on, by the processor time of the process. The output is the fastest round of both, because what
# else the machine does only adds, and their ratio; at most 1.01 is promised.

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState

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
            start = time.process_time()
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
    json.dump((time.process_time() - start) / (args.steps - 10), file)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    durations: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "script.py"
        script.write_text(SCRIPT, encoding="utf-8")
        for number in range(args.rounds):
            for launched in (False, True) if number % 2 else (True, False):
                place = Path(folder) / f"{number}-{launched}"
                durations[launched].append(time_step(script, place, args.steps, launched))
    plain, launched_seconds = (min(durations[launched]) for launched in (False, True))
    print(f"plain script      {1e6 * plain:8.0f} us a step")
    print(f"dvar launch       {1e6 * launched_seconds:8.0f} us a step, {launched_seconds / plain:.3f} of it")


if __name__ == "__main__":
    main()
