"""Trainings that a launcher starts: several processes, and what their runs must have in common."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dvar.stopping.trace import Trace

SOURCE = Path(__file__).parents[1] / "src"


def flags(model: Path, images: Path, folder: Path, **changes: Any) -> list[str]:
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": images,
        "initializer_token": "mug",
        "resolution": 32,
        "train_batch_size": 4,
        "max_train_steps": 60,
        "window": 8,
        "probe_every": 1,
        "threshold": 0.9,
        "validation_steps": 10,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        "checkpointing_steps": 4,
        "output_dir": folder,
        **changes,
    }
    return [
        word
        for name, value in settings.items()
        for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])
    ]


def start_processes(
    words: list[str], count: int, method: str = "textual-inversion", environment: Mapping[str, str] = {}
) -> list[subprocess.Popen[str]]:
    """Start ``dvar train METHOD`` on several gloo processes, as a launcher does that sets ``environment`` too."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    shared |= environment
    command = [sys.executable, "-m", "dvar", "train", method, *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(count)
    ]


def train_on(count: int, words: list[str], *options: Any) -> list[tuple[int, str, str]]:
    """Return the status and the output of each process; ``options`` are as for `start_processes`."""
    processes = start_processes(words, count, *options)
    try:
        outputs = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_same_run(first: Path, second: Path, atol: float = 1e-5) -> None:
    """Assert that two runs stopped at one step with equal losses and weights, but for the order of a sum.

    AdamW's first steps are as long for a gradient that is zero but for rounding as for any other: hence ``atol``.
    """
    traces = [Trace.read(folder / "trace.jsonl") for folder in (first, second)]
    assert traces[0].last_step == traces[1].last_step
    for name in ("train_loss", "eval"):
        ours, theirs = (trace.metric(name)[1] for trace in traces)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    names = sorted(path.name for path in first.glob("*.safetensors"))
    assert names
    for name in names:
        torch.testing.assert_close(*(load_file(folder / name) for folder in (first, second)), rtol=1e-4, atol=atol)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process that runs has written a file."""
    end = time.monotonic() + 300
    while not path.exists():
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
        assert process.returncode is None, process.communicate()
        assert time.monotonic() < end, f"{path} does not come"
