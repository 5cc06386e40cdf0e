"""One run of two processes: the samples, the verdict, the files; and a process that is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dvar.config.methods import TextualInversionConfig
from dvar.stopping.trace import Trace
from dvar.training.preflight import launcher_problems, process_problems
from dvar.training.processes import ALONE, Processes

SOURCE = Path(__file__).parents[2] / "src"


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
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def start_processes(words: list[str], count: int) -> list[subprocess.Popen[str]]:
    """Start ``dvar train textual-inversion`` on several gloo processes, as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "dvar", "train", "textual-inversion", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **pipes)
        for rank in range(count)
    ]


def train_on(count: int, words: list[str]) -> list[tuple[int, str, str]]:
    """Return the status and the output of each process."""
    processes = start_processes(words, count)
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def assert_same_run(first: Path, second: Path) -> None:
    """Assert that two runs stopped at one step with equal losses and vectors, but for the order of a sum."""
    traces = [Trace.read(folder / "trace.jsonl") for folder in (first, second)]
    assert traces[0].last_step == traces[1].last_step
    for name in ("train_loss", "eval"):
        ours, theirs = (trace.metric(name)[1] for trace in traces)
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    vectors = [load_file(folder / "learned_embeds.safetensors")["<thing>"] for folder in (first, second)]
    torch.testing.assert_close(*vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_the_run_of_one(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    outputs = {
        count: train_on(count, flags(tiny_model, tiny_images, tmp_path / str(count), threshold=0.5)) for count in (1, 2)
    }
    assert [status for status, _, _ in outputs[2]] == [0, 0], outputs[2]
    assert_same_run(tmp_path / "1", tmp_path / "2")
    verdicts = [outputs[count][0][1].splitlines()[0] for count in (1, 2)]
    assert [re.sub(r"\d+\.\d+ %", "", verdict) for verdict in verdicts] == [re.sub(r"\d+\.\d+ %", "", verdicts[0])] * 2
    assert outputs[2][1][1:] == ("", "")  # the main process speaks for both
    names = [
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        for folder in (tmp_path / "1", tmp_path / "2")
    ]
    assert names[0] == names[1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_is_killed_ends_the_run_which_resumes_on_another_number(
    lost: int, tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    settings = {"max_train_steps": 150, "validation_steps": 50, "threshold": 1e-9}
    words = flags(tiny_model, tiny_images, tmp_path / "lost", **settings)
    processes = start_processes(words, 2)
    wait_for(tmp_path / "lost" / "checkpoint-4" / "manifest.json")
    processes[lost].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, errors = processes[1 - lost].communicate(timeout=60)
    processes[lost].communicate()
    assert time.monotonic() - killed < 60
    assert processes[1 - lost].returncode == 1
    assert "has ended or hangs: see what it printed, then go on with --resume_from_checkpoint latest" in errors
    assert "Traceback" not in errors
    ((status, _, error),) = train_on(1, [*words, "--resume_from_checkpoint", "latest"])
    assert status == 0, error
    train_on(1, flags(tiny_model, tiny_images, tmp_path / "alone", **settings))
    assert_same_run(tmp_path / "alone", tmp_path / "lost")


@pytest.mark.slow
def test_two_processes_that_are_asked_to_stop_save_together_and_resume(
    tiny_model: Path, tiny_images: Path, tmp_path: Path
) -> None:
    words = flags(tiny_model, tiny_images, tmp_path / "run", max_train_steps=150, threshold=1e-9)
    processes = start_processes(words, 2)
    wait_for(tmp_path / "run" / "checkpoint-4" / "manifest.json")
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [130, 130], outputs
    outputs_resumed = train_on(2, [*words, "--resume_from_checkpoint", "latest"])
    assert [status for status, _, _ in outputs_resumed] == [0, 0], outputs_resumed
    train_on(1, flags(tiny_model, tiny_images, tmp_path / "alone", max_train_steps=150, threshold=1e-9))
    assert_same_run(tmp_path / "alone", tmp_path / "run")


def wait_for(path: Path) -> None:
    """Wait until a file exists."""
    end = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"


@pytest.mark.parametrize(
    ("samples", "at_once", "parts"),
    [
        (4, 2, [[(0, 2)], [(2, 4)]]),
        (4, 4, [[(0, 2)], [(2, 4)]]),
        (6, 2, [[(0, 2), (2, 3)], [(3, 5), (5, 6)]]),
    ],
)
def test_the_samples_of_a_step_are_shared_out(samples: int, at_once: int, parts: list[list[tuple[int, int]]]) -> None:
    shares = [Processes(rank, 2).share(samples, at_once) for rank in range(2)]
    assert [[(part.start, part.stop) for part in share] for share in shares] == parts
    assert [(part.start, part.stop) for part in ALONE.share(6, 2)] == [(0, 2), (2, 4), (4, 6)]


def test_a_launch_that_cannot_work_is_refused() -> None:
    config = TextualInversionConfig(train_batch_size=2, gradient_accumulation_steps=3)
    launched = {"RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert process_problems({}, config) == process_problems({**launched, "WORLD_SIZE": "2"}, config) == []
    assert (
        "4 processes share the samples of a step evenly, and there are 6"
        in process_problems({**launched, "WORLD_SIZE": "4"}, config)[0]
    )
    assert "got WORLD_SIZE=2 without" in process_problems({"WORLD_SIZE": "2"}, config)[0]
    assert "got PMI_SIZE=2 without" in process_problems({**launched, "PMI_SIZE": "2"}, config)[0]
    assert launcher_problems({"WORLD_SIZE": "2"}, "dvar batch") == [
        "dvar batch starts processes itself, got WORLD_SIZE=2: start it without a launcher"
    ]
    assert launcher_problems({}, "dvar batch") == []
