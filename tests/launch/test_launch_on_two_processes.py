"""A script launched on two gloo processes: training is that of the plain script, and both stop together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launched_script import SCRIPTS, SOON, find_differences, read_state, read_trace

NEVER = ("--dvar_every", "2", "--dvar_window", "20", "--dvar_threshold", "1e-9")


def launch_on_two(output_dir: Path, flags: tuple[str, ...], *arguments: str) -> list[str]:
    """Launch the plain script on two processes and return what each printed to standard error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}
    words = ["-m", "dvar", "launch", *flags, str(SCRIPTS / "plain.py"), "--output_dir", str(output_dir), *arguments]
    processes = [
        subprocess.Popen(
            [sys.executable, *words],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    return errors


@pytest.mark.slow
def test_two_processes_train_as_without_dvar_and_stop_together(tmp_path: Path) -> None:
    launch_on_two(tmp_path / "off", ("--dvar_off",))
    launch_on_two(tmp_path / "on", NEVER)
    for process in (0, 1):
        plain, measured = (read_state(tmp_path / folder, process) for folder in ("off", "on"))
        assert find_differences(plain, measured) == []
    assert read_trace(tmp_path / "on").samples.shape == (12, 8)

    first, second = launch_on_two(tmp_path / "stopped", SOON)
    step = read_trace(tmp_path / "stopped").last_step
    assert f"dvar: stop at step {step}: " in first
    assert "dvar: " not in second
    assert [read_state(tmp_path / "stopped", process)["global_step"] for process in (0, 1)] == [step, step]
