"""The end of a process whose ranks have talked through gloo."""

# A thread of gloo drops what its last collective held after the collective is over, and needs Python's lock for that.
# When the interpreter ends first, Python ends the thread where it asks for the lock, and C++ takes that for a fault:
# "terminate called without an active exception", SIGABRT (PyTorch 2.13). On a busy machine the thread can be that late.

from __future__ import annotations

import atexit
import time
from functools import cache
from pathlib import Path

SECONDS_AT_MOST = 30.0
_TASKS = Path("/proc/self/task")


@cache
def wait_for_gloo_at_exit() -> None:
    """Let the interpreter end only after `wait_for_gloo`; further calls change nothing."""
    atexit.register(wait_for_gloo)


def wait_for_gloo(seconds: float = SECONDS_AT_MOST) -> None:
    """Wait until no thread of gloo is at work; on Linux only, for nothing tells it elsewhere.

    Args:
        seconds: How long to wait at most.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.001)  # without Python's lock: a thread that waits for it runs, or is ready to
        if not any(map(_is_at_work, _TASKS.glob("*"))):
            return


def _is_at_work(task: Path) -> bool:
    """Return whether a thread is one of gloo's and is running, or would if it had a core."""
    try:
        name, state = (task / "comm").read_bytes(), (task / "stat").read_bytes().rpartition(b") ")[2]
    except OSError:  # it has ended
        return False
    return name.startswith(b"pt_gloo") and state.startswith(b"R")
