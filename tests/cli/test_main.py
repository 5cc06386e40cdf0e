"""Exit statuses and messages of the command line."""

from __future__ import annotations

import csv
import errno
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from zipfile import BadZipFile

import pytest
from command_line import dvar

from dvar.cli.main import share_cores
from dvar.cli.train import print_result
from dvar.errors import ModelError, NonFiniteLoss, OutOfResources, RefusedInput
from dvar.extras import EXTRAS
from dvar.runs.run_folder import RunFolder
from dvar.training.run import TrainingResult

MAIN = "import sys; from dvar.cli.main import main; sys.exit(main())"


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (RefusedInput(["first", "second"]), 2, ["dvar: first", "dvar: second"]),
        (ModelError("no model"), 2, ["dvar: no model"]),
        (NonFiniteLoss("lost"), 1, ["dvar: lost"]),
        (OutOfResources("no memory"), 1, ["dvar: no memory"]),
        (ModelError("no model\nof two lines"), 2, ["dvar: no model of two lines"]),
        (
            OSError(errno.ENOSPC, "No space left on device", "page.html"),
            1,
            [
                "dvar: report cannot read or write page.html: No space left on device; "
                "make room, then run the command again"
            ],
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "run/config.json"),
            2,
            [
                "dvar: report cannot read or write run/config.json: Permission denied; "
                "change its permissions, or name another"
            ],
        ),
        (
            OSError(errno.EIO, "Input/output error"),
            1,
            ["dvar: report: Input/output error; repair the disk, or name another"],
        ),
        (RecursionError("maximum depth"), 2, ["dvar: report was given a file that nests too deeply: restore it"]),
        (MemoryError(), 1, ["dvar: the memory does not suffice for report: end other programs, or ask for less"]),
        (
            UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
            2,
            [
                "dvar: report met text that is not UTF-8 ('utf-8' codec can't decode byte 0xff in position 0: "
                "invalid start byte): save it as UTF-8"
            ],
        ),
        (
            RuntimeError("Symlink loop from 'runs'"),
            2,
            ["dvar: report was given a link that leads back to itself (Symlink loop from 'runs'): name another"],
        ),
        (
            csv.Error("field larger than field limit (131072)"),
            2,
            [
                "dvar: report was given a table that is not CSV (field larger than field limit (131072)): "
                "save it as CSV again"
            ],
        ),
        (BadZipFile("bad magic"), 2, ["dvar: report was given a damaged archive (bad magic): restore it"]),
        (
            sqlite3.OperationalError("database is locked"),
            1,
            [
                "dvar: report cannot use a database of SQLite (database is locked): make room, close other programs "
                "that use it, or restore it"
            ],
        ),
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


def test_a_fault_of_dvar_itself_is_not_excused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("dvar.runs.report.write_report", fail)
    with pytest.raises(KeyError, match="a bug"):
        dvar("report", "run")


@pytest.mark.parametrize("word", ["a\0b", "a\udcffb"])
def test_arguments_that_no_file_can_hold_are_refused(word: str) -> None:
    answer = dvar("report", word)
    assert answer.status == 2
    assert answer.err == f"dvar: arguments are text in UTF-8, got {word!a}: rename the file, or correct the word\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_an_output_that_is_full_is_a_failure_in_a_line() -> None:
    with open("/dev/full", "wb") as full:
        process = subprocess.run(
            [sys.executable, "-c", MAIN, "concepts"], stdout=full, stderr=subprocess.PIPE, text=True
        )
        silent = subprocess.run([sys.executable, "-c", MAIN, "report", "no"], stdout=full, stderr=full)
    assert process.returncode == 1
    assert process.stderr == "dvar: concepts: No space left on device; make room, then run the command again\n"
    assert silent.returncode == 2


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


def test_a_report_that_cannot_be_written_does_not_cost_the_run(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    verdict = RunFolder.open(run_folder).verdict
    monkeypatch.setattr("dvar.html.templates.write_atomically", fail)
    result = TrainingResult(run_folder, verdict, 200, 200, {}, (run_folder / "learned_embeds.safetensors",))
    assert print_result(result, "a photo of <thing>") == 0
    out, err = capsys.readouterr()
    assert "weights   " in out
    assert "next      dvar generate" in out
    (line,) = err.splitlines()
    assert line.startswith("dvar: no report could be written: output ")
    assert line.endswith(f"No space left on device; choose another place; dvar report {run_folder} tries again")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "20000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_wait_briefly_unless_the_user_has_set_how(setting: dict[str, str], expected: dict[str, str]) -> None:
    share_cores(setting)
    assert setting == expected


def test_a_command_sets_how_threads_wait_before_pytorch_is_imported() -> None:
    code = (
        "import os, sys\nfrom dvar.cli.main import main\n"
        "assert 'torch' not in sys.modules\nmain(['--version'])\nprint(os.environ['GOMP_SPINCOUNT'])"
    )
    environment = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "20000"
