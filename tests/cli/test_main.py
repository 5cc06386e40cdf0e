"""Exit statuses and messages of the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import dvar

from dvar.errors import ModelError, NonFiniteLoss, OutOfResources, RefusedInput
from dvar.extras import EXTRAS

MAIN = "import sys; from dvar.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (RefusedInput(["first", "second"]), 2, ["dvar: first", "dvar: second"]),
        (ModelError("no model"), 2, ["dvar: no model"]),
        (NonFiniteLoss("lost"), 1, ["dvar: lost"]),
        (OutOfResources("no memory"), 1, ["dvar: no memory"]),
        (KeyboardInterrupt(), 130, ["dvar: interrupted"]),
        (
            ModuleNotFoundError(name="matplotlib.pyplot"),
            1,
            ["dvar: this command needs matplotlib.pyplot: pip install 'dvar[lab]'"],
        ),
        (ModuleNotFoundError(name="wandb"), 1, ["dvar: this command needs wandb: pip install wandb"]),
    ],
)
def test_a_failure_has_its_own_status_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, lines: list[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dvar.runs.report.write_report", fail)
    answer = dvar("report", "run")
    assert (answer.status, answer.err.splitlines()) == (status, lines)


def test_a_missing_module_of_dvar_itself_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError(name="dvar.runs.nothing")

    monkeypatch.setattr("dvar.runs.report.write_report", fail)
    with pytest.raises(ModuleNotFoundError):
        dvar("report", "run")


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_ends_early_is_no_error(buffered: bool) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1"}
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", MAIN, "concepts"], stdout=write, stderr=subprocess.PIPE, env=environment
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize(
    ("words", "extra"),
    [(["reproduce", "rules"], "lab"), (["survey", "serve", "nowhere"], "survey"), (["demo"], "train")],
)
def test_a_command_names_the_extra_that_it_lacks(words: list[str], extra: str, tmp_path: Path) -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({[name for name in EXTRAS if EXTRAS[name] == extra]}))"
    process = subprocess.run(
        [sys.executable, "-c", f"{hide}; {MAIN}", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert process.returncode == 1
    message = process.stderr.splitlines()[-1]
    assert message.startswith("dvar: this command needs ")
    assert message.endswith(f": pip install 'dvar[{extra}]'")
