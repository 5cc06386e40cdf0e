"""The queue: requests are files, runs begin one after another, and only the process of a run is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from fake_run import generate_trace, write_run

import dvar.studio.queue as studio_queue
from dvar.errors import FolderInUse, RefusedInput
from dvar.files import write_json
from dvar.locks import LOCK, lock_folder, lock_path
from dvar.studio.library import LibraryRun, find_run, list_runs
from dvar.studio.queue import (
    cancel,
    enqueue,
    enqueue_resumption,
    next_run,
    read_request,
    request_checkpoint,
    run_queue,
    stop,
    train,
)
from dvar.studio.run_files import HELD, QUEUE_LOCK, REQUEST, SETTINGS, STARTED
from dvar.training.run_layout import SAVE_REQUEST

METHOD = "textual-inversion"
SETTINGS_OF_MUG = {
    "placeholder_token": '<a "mug">',
    "initializer_token": "m\x7fu\x00\x1f\tg é \u2028",
    "max_train_steps": 60,
    "learning_rate": 1e-5,
    "random_flip": False,
    "validation_prompt": None,
}
INTERRUPTIBLE = """
import signal, sys
from pathlib import Path
from dvar.locks import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    signal.sigwait([signal.SIGINT])
    print("interrupted", flush=True)
"""


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that the queue has trained, by nothing but taking them out of the queue."""
    names: list[str] = []

    def train(run: LibraryRun) -> int:
        names.append(run.name)
        cancel(run)
        return 0

    monkeypatch.setattr(studio_queue, "train", train)
    return names


def test_settings_are_written_as_a_file_that_dvar_train_reads(tmp_path: Path) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    text = (tmp_path / "mug" / SETTINGS).read_text(encoding="utf-8")
    assert tomllib.loads(text) == {name: value for name, value in SETTINGS_OF_MUG.items() if value is not None}


def test_runs_are_trained_in_the_order_of_their_requests(tmp_path: Path, trained: list[str]) -> None:
    for name in ("zebra", "apple", "mango"):
        enqueue(tmp_path / name, METHOD, SETTINGS_OF_MUG)
    run_queue(tmp_path)
    assert trained == ["zebra", "apple", "mango"]
    assert next_run(tmp_path) is None


def test_a_run_waits_until_no_other_is_training(tmp_path: Path, trained: list[str]) -> None:
    write_run(tmp_path / "shell", generate_trace(steps=50), finished=False, sampled_every=0)
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    holding = lock_folder(tmp_path / "shell")
    holding.__enter__()
    waits: list[list[str]] = []

    def sleep(seconds: float) -> None:
        waits.append(list(trained))
        holding.__exit__(None, None, None)

    run_queue(tmp_path, sleep)
    assert waits == [[]], "nothing began while the other run was held"
    assert trained == ["mug"]


def test_a_process_from_before_a_restart_does_not_hold_the_queue_up(tmp_path: Path, trained: list[str]) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    started = write_run(tmp_path / "shell", generate_trace(steps=50), finished=False, sampled_every=0) / STARTED
    started.write_text(json.dumps({"process": os.getpid(), "began": "before"}))
    run_queue(tmp_path, lambda seconds: pytest.fail("the queue waits"))
    assert trained == ["mug"]
    assert not started.exists()


def test_a_damaged_request_does_not_hold_the_queue_up(tmp_path: Path, trained: list[str]) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    enqueue(tmp_path / "cat", "no-such-method", SETTINGS_OF_MUG)
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / REQUEST).write_text("{")
    run_queue(tmp_path)
    assert trained == ["mug"]


def test_a_second_runner_ends_at_once(tmp_path: Path, trained: list[str]) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    with lock_path(tmp_path / QUEUE_LOCK, tmp_path), pytest.raises(FolderInUse):
        run_queue(tmp_path)
    assert trained == []


def test_a_paused_run_goes_on_with_the_settings_that_it_has_recorded(tmp_path: Path) -> None:
    folder = write_run(
        tmp_path / "mug",
        generate_trace(steps=50),
        finished=False,
        sampled_every=0,
        method=METHOD,
        max_train_steps=77,
        instance_data_dir=str(tmp_path),
    )
    (folder / "checkpoint-50").mkdir()
    enqueue_resumption(find_run(tmp_path, "mug"))
    settings = tomllib.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    assert settings["max_train_steps"] == 77
    assert not {"output_dir", "preset", "overwrite", "resume_from_checkpoint"} & settings.keys()
    assert read_request(find_run(tmp_path, "mug"))["resume"] is True
    with pytest.raises(RefusedInput, match="must be paused, and mug is queued"):
        enqueue_resumption(find_run(tmp_path, "mug"))


def test_a_run_whose_images_are_not_found_from_here_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "mug", generate_trace(steps=50), finished=False, sampled_every=0, method=METHOD)
    (folder / "checkpoint-50").mkdir()
    with pytest.raises(RefusedInput, match="instance_data_dir of mug must exist, and images/mug does not"):
        enqueue_resumption(find_run(tmp_path, "mug"))
    assert find_run(tmp_path, "mug").state == "paused"
    (tmp_path / "images" / "mug").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    enqueue_resumption(find_run(tmp_path, "mug"))
    assert find_run(tmp_path, "mug").state == "queued"


def test_a_run_that_is_taken_out_of_the_queue_is_paused_and_can_be_put_back(tmp_path: Path) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    request = read_request(find_run(tmp_path, "mug"))
    cancel(find_run(tmp_path, "mug"))
    assert find_run(tmp_path, "mug").state == "paused"
    assert next_run(tmp_path) is None
    enqueue_resumption(find_run(tmp_path, "mug"))
    assert read_request(find_run(tmp_path, "mug")) == request


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders of the runs that were started, as processes that end at once, each tried to be taken out before."""
    folders: list[Path] = []
    popen = subprocess.Popen

    def start(words: list[str], **options: Any) -> Any:
        folder = Path(words[words.index("--output_dir") + 1])
        folders.append(folder)
        with pytest.raises(RefusedInput, match="must be waiting, and mug is paused"):
            cancel(find_run(folder.parent, folder.name))
        return popen([sys.executable, "-c", "pass"], **options)

    monkeypatch.setattr(subprocess, "Popen", start)
    return folders


def test_a_run_whose_turn_has_come_cannot_be_taken_out_of_the_queue(tmp_path: Path, started: list[Path]) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    assert train(find_run(tmp_path, "mug")) == 0
    assert started == [tmp_path / "mug"]
    assert not {REQUEST, HELD, STARTED} & {path.name for path in (tmp_path / "mug").iterdir()}
    assert find_run(tmp_path, "mug").state == "failed"


def test_a_run_that_was_taken_out_meanwhile_is_not_trained(tmp_path: Path, started: list[Path]) -> None:
    enqueue(tmp_path / "mug", METHOD, SETTINGS_OF_MUG)
    run = find_run(tmp_path, "mug")
    cancel(run)
    assert train(run) is None
    assert started == []
    assert find_run(tmp_path, "mug").state == "paused"


def test_a_request_that_was_held_yields_to_a_checkpoint(tmp_path: Path) -> None:
    trace, images = generate_trace(steps=50), str(tmp_path)
    folder = write_run(
        tmp_path / "mug", trace, finished=False, sampled_every=0, method=METHOD, instance_data_dir=images
    )
    (folder / "checkpoint-50").mkdir()
    write_json(folder / HELD, {"method": METHOD, "resume": False, "time": 1.0})
    enqueue_resumption(find_run(tmp_path, "mug"))
    assert read_request(find_run(tmp_path, "mug"))["resume"] is True
    assert not (folder / HELD).exists()


def test_stopping_interrupts_the_process_that_holds_the_run_and_no_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mug", generate_trace(steps=50), finished=False, sampled_every=0)
    run = list_runs(tmp_path)[0]
    bystander = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    try:
        (folder / LOCK).write_text(str(bystander.pid))  # a stale lock whose number went to somebody else
        assert stop(run) is False
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.communicate()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT]),
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    assert stop(run) is True
    assert process.communicate(timeout=60)[0] == "interrupted\n"
    assert stop(run) is False


def test_only_a_run_that_trains_is_asked_for_a_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mug", generate_trace(steps=50), finished=False, sampled_every=0)
    with pytest.raises(RefusedInput, match="must be training"):
        request_checkpoint(find_run(tmp_path, "mug"))
    with lock_folder(folder):
        request_checkpoint(find_run(tmp_path, "mug"))
    assert (folder / SAVE_REQUEST).exists()
