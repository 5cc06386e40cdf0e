"""Measure training beside other programs: ``python benchmarks/busy_cores.py``."""

# Updates of the size of Textual Inversion on the bundled model, in processes of their own, because OpenMP reads how its
# threads wait when it is loaded. Quiet and busy runs of all settings take turns; the median of the rounds is printed.

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

SETTINGS: dict[str, dict[str, str]] = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "all threads, as PyTorch sets them": {},
    "all threads, GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "all threads, GOMP_SPINCOUNT=20000 (dvar)": {"GOMP_SPINCOUNT": "20000"},
    "all threads, OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
OWN = {"OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
UPDATES = """
import sys, time
import torch
from dvar import mini
from diffusers import UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained(mini.path() / "unet").requires_grad_(False)
generator = torch.Generator().manual_seed(0)
latents = torch.randn(4, unet.config.in_channels, 16, 16, generator=generator)
context = torch.randn(4, 32, unet.config.cross_attention_dim, generator=generator, requires_grad=True)

def update():
    unet(latents, torch.tensor(500), context).sample.square().mean().backward()

update()
start = time.perf_counter()
for _ in range(int(sys.argv[1])):
    update()
print(int(sys.argv[1]) / (time.perf_counter() - start))
"""
BUSY = "while True: pass"


def measure_speed(setting: dict[str, str], updates: int, busy: int) -> float:
    """Return updates a second beside ``busy`` loops that never wait."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN} | setting
    loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", UPDATES, str(updates)]
        return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    finally:
        for loop in loops:
            loop.kill()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    loads = {"quiet": 0, "one core taken": 1, "all cores taken": cores}
    speeds: dict[str, dict[str, list[float]]] = {name: {load: [] for load in loads} for name in SETTINGS}
    for _ in range(options.rounds):
        for load, busy in loads.items():
            for name, setting in SETTINGS.items():
                speeds[name][load].append(measure_speed(setting, options.updates, busy))
    medians = {name: {load: statistics.median(values) for load, values in row.items()} for name, row in speeds.items()}
    print(f"{'updates a second':<45}" + "".join(f"{load:>18}" for load in loads))
    for name, row in medians.items():
        print(f"{name:<45}" + "".join(f"{row[load]:>18.2f}" for load in loads))
    if options.output:
        rows = [{"threads": name, **row} for name, row in medians.items()]
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
