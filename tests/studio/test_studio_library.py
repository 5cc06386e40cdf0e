"""The library: what the files of runs say of what each is doing, and that no name leads out of the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_run import generate_trace, write_run

from dvar.errors import RefusedInput
from dvar.locks import LOCK, lock_folder, read_holder
from dvar.studio.library import STARTING_SECONDS, describe_process, find_run, list_runs, open_run, read_state
from dvar.studio.run_files import LOG, REQUEST, STARTED
from dvar.training.run_layout import CONFIG, RESULT

TRACE = generate_trace(steps=200)
HOLD = """
import sys
from pathlib import Path
from dvar.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library with a finished run, one of a batch, and a paused one."""
    write_run(tmp_path / "mug", TRACE, sampled_every=0)
    write_run(tmp_path / "batch" / "dog", TRACE, sampled_every=0)
    write_run(tmp_path / "cat", TRACE, finished=False, sampled_every=0)
    (tmp_path / "cat" / "checkpoint-100").mkdir()
    return tmp_path


def test_every_run_is_listed_with_its_state_those_of_a_batch_too(library: Path) -> None:
    assert {run.name: run.state for run in list_runs(library)} == {
        "mug": "finished",
        "batch/dog": "finished",
        "cat": "paused",
    }


def test_the_run_that_was_written_to_last_comes_first(library: Path) -> None:
    os.utime(library / "cat" / "trace.jsonl", (2e9, 2e9))
    assert list_runs(library)[0].name == "cat"


@pytest.mark.parametrize(
    "name", ["../mug", "/etc", "", ".", "..", "batch", "mug/", "mug/../cat", None, ["mug"], "mug\0"]
)
def test_a_name_that_is_no_run_of_the_library_is_refused(library: Path, name: object) -> None:
    with pytest.raises(RefusedInput, match="choose one of the library"):
        find_run(library / "batch", name)


def test_a_link_out_of_the_folder_is_no_run(library: Path, tmp_path: Path) -> None:
    (library / "batch" / "linked").symlink_to(library / "mug")
    assert [run.name for run in list_runs(library / "batch")] == ["dog"]


def test_a_run_is_training_while_a_process_holds_it_and_no_longer(library: Path) -> None:
    folder = library / "cat"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        assert process.stdout.readline() == "held\n"
        assert read_state(folder) == "training"
        assert read_holder(folder / LOCK) == process.pid
    finally:
        process.kill()
        process.communicate()
    assert (folder / LOCK).exists(), "a killed process leaves the file"
    assert read_holder(folder / LOCK) is None
    assert read_state(folder) == "paused"


def test_a_lock_left_behind_whose_number_went_to_another_process_is_held_by_nobody(library: Path) -> None:
    (library / "cat" / LOCK).write_text(str(os.getpid()))
    assert read_holder(library / "cat" / LOCK) is None
    with lock_folder(library / "cat"):
        assert read_holder(library / "cat" / LOCK) == os.getpid()


def test_a_run_waits_starts_and_fails(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / REQUEST).write_text("{}")
    assert read_state(folder) == "queued"
    (folder / REQUEST).rename(folder / LOG)
    (folder / STARTED).write_text(json.dumps(describe_process(os.getpid())))
    assert read_state(folder) == "starting"
    (folder / STARTED).write_text(json.dumps(describe_process(2**22 + 1)))
    (folder / LOG).write_text("step 1\ndvar: the memory does not suffice: try a lower --resolution\n")
    run = find_run(tmp_path, "new")
    assert run.state == "failed"
    assert run.problem == "the memory does not suffice: try a lower --resolution"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs a system that says when a process began")
def test_a_process_that_has_the_number_of_one_that_ended_starts_no_run(library: Path) -> None:
    (library / "cat" / STARTED).write_text(json.dumps({"process": os.getpid(), "began": "1"}))
    assert read_state(library / "cat") == "paused"


def test_a_process_that_never_takes_its_lock_starts_no_run(library: Path) -> None:
    started = library / "cat" / STARTED
    started.write_text(json.dumps(describe_process(os.getpid())))
    assert read_state(library / "cat") == "starting"
    long_ago = started.stat().st_mtime - STARTING_SECONDS - 1
    os.utime(started, (long_ago, long_ago))
    assert read_state(library / "cat") == "paused"


def test_a_damaged_run_is_listed_with_what_is_wrong(library: Path) -> None:
    (library / "mug" / RESULT).write_text("{")
    run = find_run(library, "mug")
    assert run.opened is None
    assert "restore it or train again" in run.problem


def test_a_run_is_read_again_only_when_it_has_changed(library: Path) -> None:
    folder = library / "mug"
    first = open_run(folder)
    assert open_run(folder) is first
    os.utime(folder / CONFIG, (2e9, 2e9))
    assert open_run(folder) is not first
