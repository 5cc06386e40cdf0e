"""``python -m pretraining``: the whole recipe, stage after stage; killed at any point and started again, it goes on
where it was."""

from __future__ import annotations

import argparse
import subprocess
import sys

# What runs, and its arguments.
STAGES = (
    ("autoencoder", "--batch 16 --steps 3000"),
    ("clip", "--batch 96 --steps 2600"),
    ("latents", "--steps 40"),
    ("unet", "--batch 96 --steps 8000 --bound 25 --learning_rate 1.5e-3"),
    ("clip", "--name vision --batch 96 --steps 3400"),
    ("clip", "--name judge --batch 96 --steps 6000"),
    ("recogniser", "--batch 64 --steps 7000"),
    ("flow", "--batch 128 --steps 4800"),
    ("ship", "--concepts"),
    ("ship", ""),
    ("ship", "--flow"),
    ("soften", ""),
    ("evaluate", ""),
    ("evaluate", "--flow"),
    ("gallery", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="start", default="autoencoder", choices=[stage for stage, _ in STAGES])
    start = [stage for stage, _ in STAGES].index(parser.parse_args().start)
    for stage, arguments in STAGES[start:]:
        print(f"== {stage} {arguments}", flush=True)
        subprocess.run([sys.executable, "-m", f"pretraining.{stage}", *arguments.split()], check=True)


if __name__ == "__main__":
    main()
