"""Runs that are killed at random moments, and those that are asked to end."""

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

from dvar.config.training import TextualInversionConfig
from dvar.training.checkpoint import latest_checkpoint

KILLS = 50
HERE = Path(__file__).parent


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tiny_model: Path, tiny_images: Path, tmp_path: Path) -> None:
    driver = [sys.executable, str(HERE / "kill_driver.py"), str(tiny_model), str(tiny_images), str(tmp_path)]
    done = subprocess.run([*driver, str(KILLS)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, finished = map(int, done.stdout.split()[-2:])
    assert kills >= KILLS
    assert finished >= 1


@contextmanager
def busy() -> Iterator[None]:
    """A scope in which four other processes for each processor want it all the time."""
    count = 4 * (os.cpu_count() or 1)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "place", "more"),
    [
        (signal.SIGTERM, nullcontext, {}),
        pytest.param(signal.SIGINT, nullcontext, {}, marks=SLOW),
        pytest.param(signal.SIGTERM, busy, {}, marks=SLOW),
        pytest.param(signal.SIGINT, busy, {}, marks=SLOW),
        pytest.param(signal.SIGTERM, busy, {"validation_steps": 1, "num_inference_steps": 500}, marks=SLOW),
    ],
    ids=["SIGTERM", "SIGINT", "SIGTERM, busy", "SIGINT, busy", "SIGTERM, drawing, busy"],
)
def test_a_process_asked_to_end_saves_within_half_a_minute_and_says_how_to_go_on(
    config: TextualInversionConfig, number: signal.Signals, place: Any, more: dict[str, int]
) -> None:
    words = ["train", "textual-inversion", "--max_train_steps", "100000", "--preset", "paper"]
    names = ("pretrained_model_name_or_path", "instance_data_dir", "initializer_token", "resolution", "output_dir")
    given = {name: getattr(config, name) for name in (*names, "num_validation_images", "num_inference_steps")}
    for name, value in {**given, **more}.items():
        words += [f"--{name}", str(value)]
    program = [sys.executable, "-c", "import sys; from dvar.cli.main import main; sys.exit(main())"]
    popen: dict[str, Any] = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with place(), subprocess.Popen([*program, *words], **popen) as process:
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
