"""The queue of runs: a process of its own trains them one after another, and outlives the studio that started it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from dvar.errors import FolderInUse, RefusedInput
from dvar.files import read_json, write_atomically, write_json
from dvar.locks import LOCK, lock_path, read_holder
from dvar.runs.watched_process import WatchedProcess
from dvar.studio.library import LibraryRun, describe_process, list_runs, read_state
from dvar.studio.run_files import HELD, LOG, QUEUE_LOCK, REQUEST, SETTINGS, STARTED
from dvar.training.methods.registry import METHODS
from dvar.training.run_layout import SAVE_REQUEST, checkpoint_paths

POLL_SECONDS = 1.0
_REQUEST_SCHEMA = {"method": str, "resume": bool, "time": float}
_DATA = ("instance_data_dir", "concepts_list", "sample_prompts")
_DECIDED = ("resume_from_checkpoint", "overwrite", "output_dir", "preset")


def enqueue(folder: Path, method: str, settings: Mapping[str, Any]) -> None:
    """Ask for a new run by these settings; `ensure_runner` then trains it when its turn has come."""
    write_settings(folder, settings)
    write_json(folder / REQUEST, {"method": method, "resume": False, "time": time.time()})


def enqueue_resumption(run: LibraryRun) -> None:
    """Ask for a run to go on from its last checkpoint, with the settings that it has recorded.

    One that was taken out of the queue before its first checkpoint asks for what it asked for before.

    Raises:
        RefusedInput: It is training, waits already, or is damaged, or its images are not found from here.
    """
    held = run.folder / HELD
    if run.state == "paused" and held.exists() and not checkpoint_paths(run.folder):
        held.replace(run.folder / REQUEST)
        return
    if run.state != "paused" or not run.opened:
        raise RefusedInput([f"a run that goes on must be paused, and {run.name} is {run.state}: choose another"])
    settings = run.opened.settings
    for name in _DATA:  # the run has recorded each as it was typed, from the folder in which it was started
        if (path := getattr(settings, name)) and not Path(path).expanduser().exists():
            remedy = "put it back, or start the studio in the folder in which the run was started"
            raise RefusedInput([f"{name} of {run.name} must exist, and {path} does not: {remedy}"])
    names = [item.name for item in fields(settings) if item.name not in _DECIDED]
    write_settings(run.folder, {name: getattr(settings, name) for name in names})
    write_json(run.folder / REQUEST, {"method": settings.method, "resume": True, "time": time.time()})
    held.unlink(missing_ok=True)


def write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as TOML; those that are None are left out, as TOML has no word for it."""
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items() if value is not None}
    text = "".join(f"{name} = {value}\n" for name, value in values.items())
    folder.mkdir(parents=True, exist_ok=True)
    # JSON takes the character DEL as it is; every other that TOML does not take, JSON does not take either.
    write_atomically(folder / SETTINGS, text.replace("\x7f", "\\u007f").encode())


def cancel(run: LibraryRun) -> None:
    """Take a run out of the queue; `enqueue_resumption` puts it back.

    Raises:
        RefusedInput: It does not wait, as when its turn has come.
    """
    try:
        (run.folder / REQUEST).replace(run.folder / HELD)
    except FileNotFoundError:
        rule = f"a run that leaves the queue must be waiting, and {run.name} is {read_state(run.folder)}"
        raise RefusedInput([f"{rule}: look at its page again"]) from None


def stop(run: LibraryRun) -> bool:
    """Ask the process that trains a run to save and to end, and return whether there was one.

    Raises:
        RefusedInput: The process belongs to another user, or this system cannot interrupt it.
    """
    holder = read_holder(run.folder / LOCK)
    if holder is None:
        return False
    process = WatchedProcess(holder)
    try:  # its number is safe from here on, and it is the run's if it holds the lock still
        return read_holder(run.folder / LOCK) == holder and process.interrupt()
    finally:
        process.close()


def request_checkpoint(run: LibraryRun) -> None:
    """Ask a run that is training for a checkpoint.

    Raises:
        RefusedInput: It is not training.
    """
    if run.state != "training":
        raise RefusedInput([f"a run that saves must be training, and {run.name} is {run.state}: choose another"])
    write_atomically(run.folder / SAVE_REQUEST, b"")


def ensure_runner(root: Path) -> None:
    """Start the process that trains the queued runs of a library, where runs wait and there is none."""
    if read_holder(root / QUEUE_LOCK) is None and next_run(root):
        subprocess.Popen(
            [sys.executable, "-m", "dvar.studio.queue", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )


def next_run(root: Path) -> LibraryRun | None:
    """Return the run that has waited longest; None where nobody waits."""
    waiting = [run for run in list_runs(root) if run.state == "queued" and read_request(run)]
    return min(waiting, key=lambda run: (read_request(run)["time"], run.name), default=None)


def read_request(run: LibraryRun) -> Mapping[str, Any]:
    """Return the request of a queued run; an empty one where there is none or it is damaged."""
    try:
        request: Mapping[str, Any] = read_json(run.folder / REQUEST, _REQUEST_SCHEMA)
    except (OSError, ValueError):
        return {}
    return request if request["method"] in METHODS else {}


def run_queue(root: Path, sleep: Callable[[float], None] = time.sleep) -> None:
    """Train the queued runs of a library one after another, until none waits.

    A run begins when no other in the library is training, whoever started it.

    Raises:
        FolderInUse: Another process does so already.
    """
    with lock_path(root / QUEUE_LOCK, root):
        for run in list_runs(root):
            if run.state != "starting":
                (run.folder / STARTED).unlink(missing_ok=True)
        while waiting := next_run(root):
            if any(other.state in ("starting", "training") for other in list_runs(root)):
                sleep(POLL_SECONDS)
            else:
                train(waiting)


def train(run: LibraryRun) -> int | None:
    """Train a queued run in a process of its own, and return its exit status; None where it waits no longer."""
    folder, request = run.folder, read_request(run)
    try:
        cancel(run)  # nobody else can from here on; it can be put back where this process ends before it has begun
    except RefusedInput:
        return None
    words = ["train", request["method"], "--config", str(folder / SETTINGS), "--output_dir", str(folder)]
    words += ["--resume_from_checkpoint", "latest"] if request["resume"] else []
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dvar", *words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        write_json(folder / STARTED, describe_process(process.pid))
        (folder / HELD).unlink(missing_ok=True)
        status = process.wait()
    (folder / STARTED).unlink(missing_ok=True)
    return status


if __name__ == "__main__":
    with suppress(FolderInUse):
        run_queue(Path(sys.argv[1]))
