"""Measure the start-up time of the command: ``python benchmarks/start_up.py``."""

# Prints the median of eleven fresh processes, in milliseconds, and as a multiple of an empty interpreter's.

import statistics
import subprocess
import sys
import time
from pathlib import Path

DVAR = Path(sys.executable).with_name("dvar")
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import numpy": [sys.executable, "-c", "import numpy"],
    "import dvar": [sys.executable, "-c", "import dvar"],
    "dvar --help": [DVAR, "--help"],
    "dvar train textual-inversion --help": [DVAR, "train", "textual-inversion", "--help"],
}


def measure_milliseconds(command: list[str | Path]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    durations: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(11):
        for name, command in COMMANDS.items():
            durations[name].append(measure_milliseconds(command))
    baseline = statistics.median(durations["python -c pass"])
    for name, milliseconds in durations.items():
        median = statistics.median(milliseconds)
        print(f"{name:<40}{median:7.0f} ms{median / baseline:7.1f} x")


if __name__ == "__main__":
    main()
