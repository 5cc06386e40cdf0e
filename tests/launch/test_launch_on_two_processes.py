"""A script launched on two gloo processes, which stop together, and by accelerate: training is the plain script's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from launched_script import SCRIPTS, SOON, find_differences, launch, read_state, read_trace, write_script
from two_processes import run_on_two

NEVER = ("--dvar_every", "2", "--dvar_window", "20", "--dvar_threshold", "1e-9")


FULL_DISK = """
from accelerate.tracking import GeneralTracker, on_main_process

class FullDisk(GeneralTracker):
    name, requires_logging_directory, tracker = "full", False, None

    @on_main_process
    def store_init_configuration(self, values):
        pass

    @on_main_process
    def log(self, values, step=None, **settings):
        if "dvar/L_det" in values and step >= 4:
            raise OSError("No space left on device")


def main("""
"""A tracker that fails on the main process, before the function of the plain script."""

FAULT_OF_THE_SECOND = """
import os

import dvar.launch.held as held

function = {place}

def fail(*arguments, **settings):
    if os.environ["RANK"] == "1":
        raise OSError("Cannot allocate memory")
    return function(*arguments, **settings)

{place} = fail


def main("""
"""A part of the probe that fails on the second process, before the function of the plain script."""


def launch_on_two(
    output_dir: Path, flags: tuple[str, ...], script: Path = SCRIPTS / "plain.py", *arguments: str
) -> list[str]:
    """Launch a script on two processes and return what each printed to standard error."""
    return run_on_two(["-m", "dvar", "launch", *flags, str(script), "--output_dir", str(output_dir), *arguments])


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


@pytest.mark.slow
def test_a_fault_of_the_main_process_alone_leaves_no_other_waiting(tmp_path: Path) -> None:
    script = write_script(tmp_path, ("def main(", FULL_DISK), ("log_with=args.report_to", "log_with=[FullDisk()]"))
    first, second = launch_on_two(tmp_path / "on", NEVER, script, "--report_to", "full")
    assert first.count("dvar: L_det could not be logged: OSError: No space left on device") == 1
    assert "dvar: " not in second
    assert read_trace(tmp_path / "on").steps.tolist() == list(range(0, 24, 2))
    assert [read_state(tmp_path / "on", process)["global_step"] for process in (0, 1)] == [24, 24]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["held.draw_held_items", "held.HeldItems.copy"])
def test_a_fault_of_the_second_process_alone_switches_the_probe_off_on_both(place: str, tmp_path: Path) -> None:
    script = write_script(tmp_path, ("def main(", FAULT_OF_THE_SECOND.format(place=place)))
    first, second = launch_on_two(tmp_path / "on", NEVER, script)
    reason = "training goes on without a stop: OSError: Cannot allocate memory"
    assert first.count(f"dvar: the probe is switched off, and {reason}") == 1
    assert "dvar: " not in second
    assert [read_state(tmp_path / "on", process)["global_step"] for process in (0, 1)] == [24, 24]


@pytest.mark.slow
def test_a_script_that_accelerate_launches_trains_as_without_dvar(tmp_path: Path) -> None:
    assert launch("plain.py", tmp_path / "off", flags=("--dvar_off",)).status == 0
    script = ["-m", "dvar", "launch", *NEVER, str(SCRIPTS / "plain.py"), "--output_dir", str(tmp_path / "on")]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *script]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert finished.returncode == 0, finished.stderr
    assert find_differences(read_state(tmp_path / "off"), read_state(tmp_path / "on")) == []
    assert read_trace(tmp_path / "on").samples.shape == (12, 8)
