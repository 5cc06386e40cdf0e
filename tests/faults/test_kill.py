"""Runs that are killed at random moments, and those that are asked to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dvar.config import TextualInversionConfig
from dvar.trainer.checkpoint import latest

KILLS = 50
HERE = Path(__file__).parent


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(tiny_model: Path, tiny_pictures: Path, tmp_path: Path) -> None:
    driver = [sys.executable, str(HERE / "kill_driver.py"), str(tiny_model), str(tiny_pictures), str(tmp_path)]
    done = subprocess.run([*driver, str(KILLS)], capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    kills, finished = map(int, done.stdout.split()[-2:])
    assert kills >= KILLS
    assert finished >= 1


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_process_asked_to_end_saves_and_says_how_to_go_on(
    config: TextualInversionConfig, number: signal.Signals
) -> None:
    words = ["train", "textual-inversion", "--max_train_steps", "100000", "--preset", "paper"]
    names = ("pretrained_model_name_or_path", "instance_data_dir", "initializer_token", "resolution", "output_dir")
    for name in (*names, "num_validation_images", "num_inference_steps"):
        words += [f"--{name}", str(getattr(config, name))]
    program = [sys.executable, "-c", "import sys; from dvar.cli import main; sys.exit(main())"]
    with subprocess.Popen([*program, *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("step"):
                break
        os.kill(process.pid, number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "next      the same command with --resume_from_checkpoint latest" in out
    checkpoint = latest(Path(config.output_dir))
    assert f"step {checkpoint.step}" in out
    assert not (Path(config.output_dir) / "result.json").exists()
