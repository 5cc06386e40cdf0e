"""Faults in the probe of a launched script: reported once, and training goes on as if it had none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
from launched_script import NEVER, find_differences, launch, read_state, read_trace, write_script

OFF = ("--dvar_off",)


def fail_from(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function, failing from this call on."""
    calls = 0

    def counted(*args: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise OSError("No space left on device")
        return function(*args, **settings)

    return counted


@pytest.fixture
def plain_state(tmp_path: Path) -> dict[str, Any]:
    launch("plain.py", tmp_path / "off", flags=OFF)
    return read_state(tmp_path / "off")


@pytest.mark.parametrize(
    "place",
    [
        "dvar.launch.held.draw_held_items",
        "dvar.launch.held.HeldItems.copy",
        "dvar.launch.held.sample_seed",
        "dvar.launch.measurement.fix_draws",
        "dvar.launch.measurement.preserve_state",
        "dvar.launch.judge.LaunchJudge.begin",
        "dvar.launch.judge.LaunchJudge.judge",
        "dvar.launch.judge.Measurement.together",
        "dvar.stopping.trace.TraceFile.append",
    ],
)
@pytest.mark.parametrize("call", [1, 3])
def test_a_fault_of_ours_switches_the_probe_off(
    place: str, call: int, plain_state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, fail_from(call, resolve_name(place)))
    answer = launch("plain.py", tmp_path / "on")
    assert answer.status == 0
    lines = [line for line in answer.err.splitlines() if "the probe is switched off" in line]
    happened = call == 1 or place.rpartition(".")[2] not in ("draw_held_items", "begin")
    assert len(lines) == happened
    assert all("training goes on without a stop: OSError: No space left on device" in line for line in lines)
    assert find_differences(plain_state, read_state(tmp_path / "on")) == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("dvar.launch.judge.LaunchJudge.log", "L_det could not be logged: OSError: No space left on device"),
        ("dvar.launch.keep_best.BestWeights.consider", "the best weights could not be copied: OSError: No space left"),
        ("dvar.launch.keep_best.BestWeights.save", "the best weights could not be saved: OSError: No space left"),
    ],
)
def test_a_fault_of_the_main_process_alone_leaves_the_probe_on(
    place: str, line: str, plain_state: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, fail_from(1, resolve_name(place)))
    answer = launch("plain.py", tmp_path / "on", flags=(*NEVER, "--dvar_keep_best"))
    assert answer.status == 0
    assert answer.err.count("No space left on device") == answer.err.count(f"dvar: {line}") == 1
    assert find_differences(plain_state, read_state(tmp_path / "on")) == []
    assert read_trace(tmp_path / "on").steps.tolist() == list(range(0, 24, 2))


def test_a_line_that_cannot_be_printed_leaves_the_probe_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []

    def print_message(line: str) -> None:
        lines.append(line)
        if len(lines) == 1:
            raise BrokenPipeError

    monkeypatch.setattr("dvar.cli.launch.print_message", print_message)
    assert launch("plain.py", tmp_path / "on").status == 0
    assert "the loop of line" in lines[0]
    assert read_trace(tmp_path / "on").steps.tolist() == list(range(0, 24, 2))


def test_a_script_that_fails_on_single_samples_gets_whole_batches(tmp_path: Path) -> None:
    change = ("loss = compute_loss(", "assert len(batch['pixels']) == 2\n                loss = compute_loss(")
    script = write_script(tmp_path, change)
    for folder, flags in (("off", OFF), ("on", ("--dvar_every", "2", "--dvar_window", "20"))):
        assert launch(script, tmp_path / folder, flags=flags).status == 0
    assert find_differences(read_state(tmp_path / "off"), read_state(tmp_path / "on")) == []
    assert {len(row["eval"]) for row in read_trace(tmp_path / "on").records} == {4}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "if not torch.is_grad_enabled(): raise KeyError('no gradient')",
            "the script computed no loss on a held batch (KeyError: 'no gradient')",
        ),
        ("if not torch.is_grad_enabled(): continue", "the loop went on without backward"),
    ],
)
def test_a_script_that_cannot_compute_a_loss_on_held_batches_trains_on(
    change: str, reason: str, plain_state: dict[str, Any], tmp_path: Path
) -> None:
    scope = "with accelerator.accumulate"
    script = write_script(tmp_path, (scope, f"{change}\n            {scope}"))
    answer = launch(script, tmp_path / "on")
    assert answer.status == 0
    assert answer.err.count("the probe is switched off") == 1
    assert reason in answer.err
    assert find_differences(plain_state, read_state(tmp_path / "on")) == []


def test_errors_of_the_script_itself_end_it_with_its_own_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "raise ModuleNotFoundError('bitsandbytes', name='bitsandbytes')"
    script = write_script(tmp_path, ("optimizer.step()", missing))
    answer = launch(script, tmp_path / "out")
    assert answer.status == 1
    output = answer.err + capsys.readouterr().err
    assert "Traceback (most recent call last):" in output
    assert "ModuleNotFoundError: bitsandbytes" in output
    assert "pip install" not in output
    assert "runner.py" not in output


@pytest.mark.parametrize(("code", "status"), [("0", 0), ("3", 3), ("None", 0), ("'no images'", 1)])
def test_the_exit_status_is_that_of_the_script(code: str, status: int, tmp_path: Path) -> None:
    script = write_script(tmp_path, ("    seed_everything()\n", f"    raise SystemExit({code})\n"))
    answer = launch(script, tmp_path / "out")
    assert answer.status == status
    assert ("no images" in answer.err) == (status == 1)


def test_the_script_is_the_main_program_with_its_own_arguments(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, inspect\nassert __name__ == '__main__' and sys.modules['__main__'].__file__ == __file__\n"
        "def f(): return 1\nprint(sys.argv[1:], sys.path[0], inspect.getsource(f))\n"
        "def train():\n    for batch in loader:\n        accelerator.backward(batch)\n"
    )
    answer = launch(script, tmp_path, "--help", "--", "-x", flags=())
    arguments = ["--output_dir", str(tmp_path), "--help", "--", "-x"]
    assert answer.out.startswith(f"{arguments} {tmp_path} def f(): return 1")
    assert answer.status == 0
