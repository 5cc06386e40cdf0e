"""Runs that are killed at random moments or end by a signal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from dvar.config.methods import TextualInversionConfig
from dvar.training.checkpoint import latest_checkpoint

KILLS = 50
HERE = Path(__file__).parent


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    driver = [sys.executable, str(HERE / "kill_driver.py"), str(tiny_model), str(tiny_images), str(tmp_path)]
    process = subprocess.run([*driver, str(KILLS)], capture_output=True, text=True, timeout=1800)
    assert process.returncode == 0, process.stderr[-2000:]
    kills, runs = map(int, process.stdout.split()[-2:])
    assert kills >= KILLS
    assert runs >= 1


@contextmanager
def keep_processors_busy() -> Iterator[None]:
    """Keep each processor busy with four other processes within a scope."""
    count = 4 * (os.cpu_count() or 1)
    busy = f"import os\nwhile os.getppid() == {os.getpid()}: pass"  # not for ever, should this process be killed
    processes = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "scope", "changes"),
    [
        (signal.SIGTERM, nullcontext, {}),
        pytest.param(signal.SIGINT, nullcontext, {}, marks=SLOW),
        pytest.param(signal.SIGTERM, keep_processors_busy, {}, marks=SLOW),
        pytest.param(signal.SIGINT, keep_processors_busy, {}, marks=SLOW),
        pytest.param(
            signal.SIGTERM, keep_processors_busy, {"validation_steps": 1, "num_inference_steps": 500}, marks=SLOW
        ),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM, busy", "SIGINT, busy", "SIGTERM, sampling, busy"],
)
def test_a_signal_ends_a_process_within_half_a_minute_with_a_checkpoint_and_a_hint(
    config: TextualInversionConfig, number: signal.Signals, scope: Any, changes: dict[str, int]
) -> None:
    arguments = ["train", "textual-inversion", "--max_train_steps", "100000", "--preset", "paper"]
    names = ("pretrained_model_name_or_path", "instance_data_dir", "initializer_token", "resolution", "output_dir")
    settings = {name: getattr(config, name) for name in (*names, "num_validation_images", "num_inference_steps")}
    for name, value in {**settings, **changes}.items():
        arguments += [f"--{name}", str(value)]
    program = [sys.executable, "-c", "import sys; from dvar.cli.main import main; sys.exit(main())"]
    popen: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with scope(), subprocess.Popen([*program, *arguments], **popen) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step"):
                break
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "next      the same command with --resume_from_checkpoint latest" in out
    checkpoint = latest_checkpoint(Path(config.output_dir))
    assert f"step {checkpoint.step}" in out
    assert not (Path(config.output_dir) / "result.json").exists()
