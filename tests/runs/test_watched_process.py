"""Processes of other programs that are interrupted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dvar.runs.watched_process import WatchedProcess

CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: sys.exit(7))
pathlib.Path(sys.argv[1]).touch()
time.sleep(120)
"""
LAUNCHER = """
import pathlib, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
child = subprocess.Popen([sys.executable, "-c", sys.argv[2], sys.argv[1]])
number = pathlib.Path(sys.argv[1] + ".part")
number.write_text(str(child.pid))
number.rename(sys.argv[1] + ".pid")
status = child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_what_a_launcher_has_started_is_interrupted_with_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", LAUNCHER, str(tmp_path / "ready"), CHILD]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        while not ((tmp_path / "ready").exists() and (tmp_path / "ready.pid").exists()):
            assert launcher.poll() is None
        child = WatchedProcess(int((tmp_path / "ready.pid").read_text()))
        process = WatchedProcess(launcher.pid)
        assert not process.wait(0)
        assert process.interrupt(descendants=True)
        launcher.communicate(timeout=60)  # which ends once nobody holds its output open any more
        assert not child.is_running()
        assert not process.interrupt(descendants=True)
        assert process.wait(60)
        child.close()
        process.close()
