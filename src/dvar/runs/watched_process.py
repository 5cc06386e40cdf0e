"""A process of another program, watched until it ends and interrupted when its training is done."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from dvar.errors import RefusedInput
from dvar.files import read_content


class WatchedProcess:
    """A running process.

    Args:
        pid: Its number.

    Raises:
        RefusedInput: There is no such process, it belongs to another user, or this system cannot interrupt it.
    """

    # Where the system has handles of processes, a handle is kept: a number may be given to another process.

    def __init__(self, pid: int) -> None:
        self.pid, self._handle = pid, -1
        if sys.platform == "win32":
            raise RefusedInput([f"pid cannot be interrupted on Windows, got {pid}: use --stop_file or --on_stop"])
        try:
            if hasattr(os, "pidfd_open"):
                self._handle = os.pidfd_open(pid)
            os.kill(pid, 0)
        except ProcessLookupError as error:
            raise RefusedInput(
                [f"pid must be a running process, and {pid} is none: start the training first"]
            ) from error
        except PermissionError as error:
            raise RefusedInput(
                [f"pid must be a process that you may interrupt, and {pid} belongs to another user: run dvar as that"]
            ) from error

    def is_running(self) -> bool:
        """Return whether the process has not ended yet."""
        if self._handle >= 0:
            return not select.select([self._handle], [], [], 0)[0]
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds: float) -> bool:
        """Wait until the process has ended, for at most so many seconds, and return whether it has."""
        if self._handle >= 0:
            return bool(select.select([self._handle], [], [], seconds)[0])
        end = time.monotonic() + seconds
        while (running := self.is_running()) and time.monotonic() < end:
            time.sleep(0.1)
        return not running

    def interrupt(self, *, descendants: bool = False) -> bool:
        """Send SIGINT, and return whether the process was still there.

        Args:
            descendants: Send it to the processes that this one has started too, as Ctrl-C does: ``accelerate launch``
                waits for the one that trains, and ends alone.
        """
        if not self.is_running():
            return False
        for pid in _find_descendants(self.pid) if descendants else ():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGINT)
        try:
            if self._handle >= 0:
                signal.pidfd_send_signal(self._handle, signal.SIGINT)
            else:
                os.kill(self.pid, signal.SIGINT)
        except ProcessLookupError:
            return False
        return True

    def close(self) -> None:
        """Give the handle back to the system."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


def _find_descendants(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that these have; none without a /proc."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):  # it has ended
            parent = int(read_content(path).rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    descendants = list(children.get(pid, ()))
    for child in descendants:  # which grows
        descendants += children.get(child, ())
    return descendants
